# /// script
# requires-python = ">=3.11"
# dependencies = ["torch>=2.9", "tiktoken", "numpy"]
# ///
"""cocoracle: can we read what a language model is thinking while it reasons in latent space?

A GPT-2 learns to add with a written, carry-by-carry chain of thought. A curriculum replaces the
written steps by *continuous thoughts* (Coconut). Then we ask what a thought holds: in words, by an
*activation oracle* that gets its hidden state injected, and in deeds, by giving a problem another
problem's thought in place of one of its own. Two functions carry the whole file:

    columns(a, b, given)                  work the sum by hand, some steps given     (section 3)
    think(model, prompt, count, given)    think it in the model, some thoughts given (section 5)

If thoughts mean what they say, the model answers what the hand-worked sum spells.

    python cocoracle.py                                # tiny, from scratch, CPU, minutes
    python cocoracle.py --model gpt2-large             # one CUDA GPU, released weights
    python cocoracle.py --stage ask --out runs/tiny    # type 347+285 and watch it think

Sections: 1 this text, 2 configuration, 3 the problem, 4 GPT-2, 5 thinking, 6 reading, 7 training,
8 Coconut, 9 oracles, 10 probes, 11 evaluation, 12 report, 13 ask, 14 command line.

Papers: Coconut (arXiv 2412.06769), Activation Oracles (2512.15674), interchange intervention
training (2112.00826), LoRA (2106.09685).

Glossary
  step      one line of text chain of thought, `7+5=12 write 2 carry 1`; in training, an update
  thought   one latent position: its input is the hidden state after ln_f of the position before
  slot      index of a step or thought in its problem (D digits make D+1, the last the final carry)
  stage k   the last k slots are thoughts, those before are text: "0" is all text, "all" the last
  layer l   the residual stream after l blocks: 0 is what enters the first block
  reading   the residual stream of one thought at the layer read
  oracle    a model that gets a reading injected at <act> and answers a question about it. The
            self-oracle is the model that thought it, or a fine-tuned copy
  donor     the problem whose thought is given
  size      of a problem: the digits of an operand. All problems of a batch have the same
  coconut   the model that has gone through all stages; the base: after stage 0, or released
  reader    an oracle or a probe; in training it is asked about no step that is never_read()
  part      of the program, what --stage names: coconut, probes, oracle, lora, eval, ask
  original  syvb/cocoracle, the project that this one re-implements
  iia       interchange accuracy: with a thought given, how often the answer is what the hand-worked
            sum with the donor's step spells. keep: with all given, how often it stays as it was
  a rate    {"exact": share, "n": number, "ci95": interval}, as in results.json
  B batch, T positions of this call, S positions before, C width, V vocabulary, H heads,
  K thoughts, N readings
"""

import argparse
import dataclasses
import html
import inspect
import json
import math
import os
import re
import runpy
import signal
import subprocess
import sys
import time
import traceback
import zipfile
import zlib
from collections import Counter, defaultdict
from contextlib import contextmanager, nullcontext
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tiktoken
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

# one_line(what, advice) makes any error within a UserError; write_atomic() replaces a file whole.
import gpt2_weights
from gpt2_weights import UserError, one_line, read_safetensors, write_atomic, write_safetensors

# --------------------------------------------------------------------------------------------------
# 2. Configuration

class Size(NamedTuple):
    layers: int
    heads: int
    width: int
    positions: int = 1024

# 0.4, 3 and 25 million parameters, from scratch alone; and GPT-2's, 124 million to 1.6 billion
SIZES = {"tiny": Size(3, 3, 96, 256), "small": Size(6, 6, 192, 256), "medium": Size(8, 8, 512, 256)}
SIZES |= {name: Size(*size) for name, size in gpt2_weights.SIZES.items()}

class Kind(NamedTuple):
    """What thoughts are made of."""
    latent: bool = True  # thoughts in place of steps (else: nothing in their place)
    pause: bool = False  # each is fed the embedding of <bot> (else: the last hidden state)
    bottleneck: bool = False  # in the last stage the answer sees the thoughts alone
    explain: bool = False  # thoughts are trained to let the model say their step
    exchange: bool = False  # another problem gives a step: as text, in the last stage as a thought

KINDS = {
    "none": Kind(latent=False),  # Coconut's "w/o thought": steps dropped
    "pause": Kind(pause=True),  # more positions, no content
    "plain": Kind(),  # Coconut, and the original
    "bottleneck": Kind(bottleneck=True),
    "explained": Kind(bottleneck=True, explain=True),  # SIM-CoT (2509.20317)
    "faithful": Kind(bottleneck=True, explain=True, exchange=True),
}

class Recipe(NamedTuple):
    adam: float  # peak rate of AdamW, at tiny's width; it goes with 1 / width
    muon: float  # peak rate of Muon, on the blocks' matrices, at any width; 0: AdamW on these too
    decay: float  # weight decay

# Of the last stage, by whether thoughts are explained, and of all else. Decay makes words hold for
# steps that are never read; more of it leaves more to read in thoughts that nobody explains.
RECIPES = {"text": Recipe(3e-3, 0.02, 0.01), "explained": Recipe(3e-3, 0.02, 0.1),
           "unexplained": Recipe(3e-3, 0.01, 0.3)}
PROBE_RECIPE = Recipe(5e-3, 0.0, 0.01)
AGAIN = 0.15  # share of the last stage's batches that repeat stage 0, half as large: text on demand
REHEARSAL = 0.25  # share of a fine-tuned oracle's batches that repeat the coconut's own task too
OTHER = 0.02  # share of a reader's questions in each family but the first, the step
SCALE = 2.0  # of an injected reading, relative to the state it is added to
LORA_RANK = 32
SAVE_EVERY = 60.0  # seconds between checkpoints
LOG_EVERY = 100  # steps

def flag(default, help, choices=None, low=1, high=2**31):
    """A field of Config: its default and, for the command line, its help and limits."""
    metadata = {"help": help, "choices": choices, "low": low, "high": high}
    return dataclasses.field(default=default, metadata=metadata)

@dataclasses.dataclass(frozen=True)
class Config:
    """What a run can be told. The command line is made of these fields. Larger models take fewer
    steps in thoughts: parse()."""
    stage: str = flag("all", "what to run; all: everything but ask, in order", (
        "all", "coconut", "probes", "oracle", "lora", "eval", "ask"))
    model: str = flag("tiny", "size of the GPT-2", tuple(SIZES))
    init: str = flag("auto", "auto: GPT-2's released weights, at its sizes", ("auto", "scratch"))
    weights: str = flag("", "folder with GPT-2's released files (else fetched, and cached)")
    out: str = flag("", "folder of the run (default runs/MODEL)")
    resume: bool = flag(False, "go on with the run in --out")
    seed: int = flag(0, "seed of weights and data", low=0)
    device: str = flag("auto", "auto: the GPU if there is one", ("auto", "cpu", "cuda"))
    dtype: str = flag("auto", "auto: bfloat16 on a GPU", ("auto", "float32", "bfloat16"))
    compile: bool = flag(None, "torch.compile the blocks (default: on a GPU)")
    # the experiment
    task: str = flag("", "FILE.py with a class Task of your own, in place of sums")
    digits: tuple = flag((2, 3, 4), "sizes of problems, as `2-4` or `2,3`")
    thoughts: str = flag("faithful", "kind of thoughts, see KINDS", tuple(KINDS))
    read_layer: float = flag(0.5, "layer that is read, as a share of the depth", low=0, high=1)
    explain: float = flag(0.5, "thoughts asked for in words, in training, a problem", low=0.1)
    given: int = flag(1, "steps of a problem given at once, in training, at most")
    # training, in steps
    batch_size: int = flag(32, "problems (or readings) in a batch, all of one size", low=2)
    accumulate: int = flag(2, "batches in a step, each of its own problems and size")
    train_text: int = flag(250, "stage 0, all text", low=0)
    train_mixed: int = flag(90, "stage 1; stage k takes k times as many", low=0)
    train_latent: int = flag(2200, "the last stage, all thoughts, with all ingredients", low=0)
    train_oracle: int = flag(2300, "the fine-tuned self-oracle", low=0)
    train_lora: int = flag(450, "the LoRA oracle", low=0)
    train_probes: int = flag(1000, "each probe, of 8 times as many readings a step", low=0)
    # evaluation
    eval_problems: int = flag(1000, "held-out problems, split evenly over --digits")
    split: str = flag("test", "where they come from", ("validation", "test"))

    @property
    def kind(self):
        return KINDS[self.thoughts]

    @property
    def pretrained(self):
        return self.init == "auto" and self.model in gpt2_weights.SIZES

    @property
    def size(self):
        """Of the model; with --weights, as the config.json there says."""
        if self.weights and self.pretrained:
            return Size(*gpt2_weights.read_size(self.weights))
        return SIZES[self.model]

    @property
    def recipes(self):
        tiny, width = SIZES["tiny"].width, self.size.width
        return {name: recipe._replace(adam=recipe.adam * tiny / width)
                for name, recipe in RECIPES.items()}

    @property
    def knobs(self):
        """What config.json and results.json hold: all but how this process was started."""
        session = ("stage", "out", "resume", "device", "compile")
        return {name: x for name, x in dataclasses.asdict(self).items() if name not in session}

    @property
    def layer(self):
        """The layer read. A reading is added one layer before, as in the original."""
        return math.ceil(self.read_layer * self.size.layers)

# --------------------------------------------------------------------------------------------------
# 3. The problem: 347+285, its steps, its counterfactual, its tokens, the split

TRAIN, VALIDATION, TEST = "train", "validation", "test"

class Step(NamedTuple):
    """One column of a sum. The final carry is a step, too: (None, None, carry, carry, 0)."""
    a: int | None
    b: int | None
    carry: int  # that comes in
    digit: int  # that is written
    carry_out: int

def columns(a, b, given={}):
    """Work a + b by hand -> its steps, lowest column first, and last the final carry.

    given {slot: Step}: taken as it stands, whatever the digits are; later columns go on from its
    carry. That is what think() does with a given thought, if thoughts mean what they say.
    """
    steps, carry = [], 0
    for slot, (x, y) in enumerate(zip(reversed(str(a)), reversed(str(b)))):
        total = int(x) + int(y) + carry
        step = given.get(slot, Step(int(x), int(y), carry, total % 10, total // 10))
        steps.append(step)
        carry = step.carry_out
    final = Step(None, None, carry, carry, 0)
    return [*steps, given.get(len(steps), final)]

def split_of(key):
    """The split that a problem belongs to for good: 85% train, 5% validation, 10% test."""
    bucket = zlib.crc32(key.encode()) % 100
    return TRAIN if bucket < 85 else VALIDATION if bucket < 90 else TEST

class Defaults:
    """What a task of your own (--task) may leave out. The rest is as in Sums."""
    FIELDS, words = {}, ""

    def __init__(self, sizes):
        pass

    def fields(self, step):
        return {}

    def never_read(self, step):
        return False

    def looser(self, said):
        return {}

    def typed(self, line):
        return None

class Sums:
    """The task: a + b of equally many digits. Another one (--task) has the same names."""
    FIELDS = {"a": 10, "b": 10, "carry": 2, "digit": 10}  # of a step: name, number of classes
    NEVER_READ = {(0, 6), (1, 7), (2, 5), (3, 9), (4, 4), (6, 8)}  # of 55 unordered digit pairs
    words = "write carry"  # that the vocabulary from scratch should hold, beside the questions'

    def __init__(self, sizes):
        """sizes: from --digits, here the digits of an operand."""
        if min(sizes) < 2 or max(sizes) > 8:
            raise UserError("--digits takes 2 to 8 digits, as `2-4` or `2,3`")

    def draw(self, rng, split, size, n):
        """n problems of one size. Held-out ones are distinct up to order, and maybe fewer."""
        problems, seen = [], set()
        numbers = rng.integers(10 ** (size - 1), 10**size, size=(40 * n + 1000, 2))
        for a, b in numbers.tolist():
            key = f"{min(a, b)}+{max(a, b)}"  # b+a is where a+b is
            if split_of(key) == split and (split == TRAIN or key not in seen):
                seen.add(key)
                problems.append((a, b))
                if len(problems) == n:
                    break
        return problems

    def size(self, problem):
        return len(str(problem[0]))

    def text(self, problem):
        a, b = problem
        return f"{a}+{b}="

    def work(self, problem, given={}):
        """The steps of a problem: as many for all of one size. A task that leaves out `given` is
        never exchanged."""
        return columns(*problem, given)

    def say(self, step):
        """A step in words."""
        if step.a is None:
            return "carry 1 write 1" if step.carry else "carry 0"
        operands = f"{step.a}+{step.b}" + "+1" * step.carry
        total = step.a + step.b + step.carry
        return f"{operands}={total} write {step.digit}" + " carry 1" * step.carry_out

    def spell(self, steps):
        """The answer that steps spell."""
        return "".join(str(step.digit) for step in reversed(steps)).removeprefix("0")

    def fields(self, step):
        """Values of FIELDS; None for steps that figures leave out: a final carry has two forms."""
        return None if step.a is None else {name: getattr(step, name) for name in self.FIELDS}

    def never_read(self, step):
        """Whether no reader is ever trained on such a step: does it know the rule, or a list?"""
        return step.a is not None and tuple(sorted(step[:2])) in self.NEVER_READ

    def looser(self, said):
        """What of a step's words must agree for measures that ask for less."""
        operands, _, rest = said.partition("=")
        either = "+".join(sorted(operands.split("+"))) + "=" + rest
        return {"either_order": either, "result": said.partition(" write ")[2]}

    def typed(self, line):
        """What a person typed -> a problem, or None."""
        match = re.fullmatch(r"([1-9]\d{0,98}) *\+ *([1-9]\d{0,98})", line, re.ASCII)
        same = match and len(match[1]) == len(match[2])
        return (int(match[1]), int(match[2])) if same else None

# What begins the steps or thoughts, ends a step, begins the answer, and where a reading goes. With
# each, the GPT-2 token whose embedding it starts from.
SPECIAL = {"<bot>": ":", "<sep>": ".", "<eot>": " answer", "<act>": " thought"}
RESERVED = ("<|endoftext|>", *SPECIAL)
IGNORE = -100  # a target that is not trained on

# Families of questions about a thought; each field of a step makes one more. WHOLE: about the whole
# problem, asked of the last thought, as in the original.
NOUNS = {
    "step": ("the intermediate calculation", "the calculation", "this calculation"),
    "slot": ("the slot", "the number of the slot"),
    "answer": ("the final answer", "the answer", "the result"),
    "problem": ("the problem", "this problem")}
PLACES = (" at this reasoning step", " at this step", " of this step", "")
FORMS = ("What is {}{}?", "Which is {}{}?", "Write {}{}.")
WHOLE = ("answer", "problem")

def rng_of(seed, *where):
    """Data is a function of (seed, purpose, step): resuming replays nothing."""
    words = [zlib.crc32(part.encode()) if isinstance(part, str) else part for part in where]
    return np.random.default_rng([seed, *words])

def put(x, device):
    """An array or a list on the device; the host does not wait for it."""
    return torch.as_tensor(x).to(device, non_blocking=True)

def pad(rows, fill, left=False):
    """Sequences of ids -> (n, longest) array, filled up on one side."""
    padded = np.full((len(rows), max(map(len, rows))), fill, dtype=np.int64)
    for row, ids in zip(padded, rows):
        start = len(row) - len(ids) if left else 0
        row[start:start + len(ids)] = ids
    return padded

class Text:
    """Text <-> token ids: tiktoken with GPT-2's split pattern, but one token a digit.

    From scratch the vocabulary is the 256 bytes, then whole words of the questions and the task
    (tiktoken takes a piece that is in its ranks as one token), then the special tokens.
    """
    PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""

    def __init__(self, task, ranks=None):
        self.wordings, self.test_wording = {}, {}  # family: those trained on, the one that never is
        families = NOUNS | {field: (f"the value of {field}", field) for field in task.FIELDS}
        for family, nouns in families.items():
            asked = [form.format(noun, at) for noun, at, form in product(nouns, PLACES, FORMS)]
            self.test_wording[family] = asked.pop(len(asked) // 2)
            self.wordings[family] = asked
        self.families = list(families)  # the step's first
        self.of_thoughts = [family for family in families if family not in WHOLE]
        self.ranks = ranks or self.own_ranks(task)
        self.special = {name: len(self.ranks) + i for i, name in enumerate(RESERVED)}
        self.enc = tiktoken.Encoding("cocoracle", pat_str=self.PATTERN, mergeable_ranks=self.ranks,
                                     special_tokens=self.special)
        self.eos, self.bot, self.sep, self.eot, self.act = self.special.values()
        self.n_vocab = self.enc.n_vocab

    def own_ranks(self, task):
        questions = sum(self.wordings.values(), [])
        words = set(re.findall(r"[A-Za-z]+", " ".join([*questions, task.words, "Layer"])))
        words |= {" " + word for word in [*words, *"0123456789"]}
        pieces = [bytes([i]) for i in range(256)]
        pieces += [word.encode() for word in sorted(words) if len(word) > 1]
        return {piece: rank for rank, piece in enumerate(pieces)}

    @lru_cache(maxsize=4096)
    def ids(self, string):
        return tuple(self.enc.encode_ordinary(string))

    def show(self, ids):
        """Ids up to the first <|endoftext|> as text."""
        ids = [*ids, self.eos]
        return self.enc.decode(ids[:ids.index(self.eos)])

class Run(NamedTuple):
    """What everything needs. Weights and figures live in the folder."""
    cfg: Config
    task: object
    text: Text
    out: Path
    slots: int = 0  # of the longest problem
    longest: int = 0  # tokens of a problem, step or answer: where greedy writing gives up
    start: float = 0.0  # when the part that runs began: time.time(), less the time before --resume

    @property
    def exchanges(self):
        """Whether the task can be worked with a step given."""
        return "given" in inspect.signature(self.task.work).parameters

class Batch(NamedTuple):
    """Problems of one size. `*_target[t]` is the token that position t must predict, or IGNORE."""
    prefix: torch.Tensor  # (B, T) the problem, <bot> and the text steps, padded on the left
    valid: torch.Tensor | None  # (B, T) bool, False at padding; None: no padding
    text_target: torch.Tensor  # (B, T') for the last T' positions of the prefix: the text steps
    answer: torch.Tensor  # (B, T") <eot> and the answer, padded on the right
    answer_target: torch.Tensor  # (B, T")

def make_batch(run, problems, works, n_text, given_slots=()):
    """Problems, worked as in `works` (lists of steps), the first n_text steps as text -> Batch.
    given_slots: those whose text is not to be predicted."""
    task, text, device = run.task, run.text, run.cfg.device
    prefixes, targets, answers = [], [], []
    for problem, steps in zip(problems, works):
        written, target = [], []
        for slot, step in enumerate(steps[:n_text]):
            ids = [*text.ids(task.say(step)), text.sep]
            written += ids
            target += [IGNORE] * len(ids) if slot in given_slots else ids
        prefixes.append([*text.ids(task.text(problem)), text.bot, *written])
        # Targets stand one to the left of their tokens. Nothing is to follow the last <sep>: there
        # a thought is fed, or <eot>.
        targets.append([*target, IGNORE] if n_text else [])
        answers.append([text.eot, *text.ids(task.spell(steps)), text.eos])
        positions = len(prefixes[-1]) + len(steps) - n_text + len(answers[-1]) - 1
        if positions > run.cfg.size.positions:
            raise UserError(f"the task's draw: {positions} positions: {problem!r:.80}")
    prefix = pad(prefixes, text.eos, left=True)
    valid = prefix != text.eos
    return Batch(
        put(prefix, device),
        None if valid.all() else put(valid, device),
        put(pad(targets, IGNORE, left=True), device),
        put(pad([ids[:-1] for ids in answers], text.eos), device),
        put(pad([ids[1:] for ids in answers], IGNORE), device))

@contextmanager
def task_code(where):
    """Around code of a task of your own, which raises anything: it costs one line."""
    try:
        yield
    except UserError:
        raise
    except Exception as e:
        method = traceback.extract_tb(e.__traceback__)[-1].name
        told = e if isinstance(e, AssertionError) else f"{method}: {type(e).__name__}: {e!s:.200}"
        raise UserError(f"{where}: {told}") from None

def try_problem(run, problem, first):
    """Work a problem; `first` are the steps of another of its size -> tokens of its longest text.
    Raises anything."""
    task, text, steps = run.task, run.text, run.task.work(problem)
    given = task.work(problem, {0: first[0]}) if run.exchanges else first
    written = [task.text(problem), task.spell(steps), *map(task.say, steps)]
    looser = [[*task.looser(words)] for words in (*written, "")]
    assert len(steps) == len(first), f"work: {len(steps)} steps, of others of its size {len(first)}"
    assert given[0] == first[0], "work: a given step must be taken as it stands"
    spelt = [text.show(text.ids(words)) for words in written]
    assert spelt == written, "text, say and spell: not what tokens can spell"
    assert looser == looser[:1] * len(looser), "looser: the same names, of any text"
    for fields in map(task.fields, steps):
        if fields is not None:
            fit = [fields.get(name) in range(n) for name, n in task.FIELDS.items()]
            assert all(fit), "fields: None, or for each of FIELDS a number below it"
    make_batch(run, [problem], [steps], len(steps))  # refuses what is too long
    return max(len(text.ids(words)) for words in written)

def try_out(run):
    """Work some problems of each size, so that a mistake in a task of your own costs no training
    -> the Run, with its slots and longest. Raises UserError."""
    task, slots, longest = run.task, [], []
    asked = max(len(run.text.ids(words)) for words in sum(run.text.wordings.values(), []))
    if asked + 5 > run.cfg.size.positions // 8:  # 5: " Layer 12:"
        raise UserError("the task's FIELDS: a name makes too long a question")
    for size in run.cfg.digits:
        with task_code(f"the task, size {size}"):
            drawn = task.draw(rng_of(0, "longest", size), TRAIN, size, 300)
            tests = task.draw(rng_of(0, "held out"), run.cfg.split, size, 4)
            assert drawn and len(tests) >= (4 if run.exchanges else 2), (  # there must be donors
                f"draw: {len(drawn)} to train on, {len(tests)} of 4 to test on")
            assert {size} == {*map(task.size, drawn)}, "size: another one"
            first = task.work(drawn[0])
        for problem in drawn:
            with task_code(f"the task, problem {problem!r:.80}"):
                longest.append(try_problem(run, problem, first))
        with task_code(f"the task, size {size}"):
            steps = sum(map(task.work, drawn), [])
            known = [step for step in steps if task.fields(step) is not None]
            assert not all(map(task.never_read, known)), "fields, never_read: nothing to read"
        slots.append(len(first))
    return run._replace(slots=max(slots), longest=max(longest))

# --------------------------------------------------------------------------------------------------
# 4. GPT-2: names and layouts of the released state dict (openai/gpt-2 src/model.py)

class Conv1D(nn.Module):
    """GPT-2's linear layer, y = x W + b with W (in, out), and room for an adapter (section 6)."""

    def __init__(self, n_in, n_out):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_in, n_out))
        self.bias = nn.Parameter(torch.zeros(n_out))
        self.cast = None  # the weight in bfloat16, within precision()
        self.lora_scale = 0.0

    def forward(self, x):
        """(N, in) -> (N, out)."""
        y = torch.addmm(self.bias, x, self.weight if self.cast is None else self.cast)
        if self.lora_scale:
            y = y + (x @ self.lora_a) @ self.lora_b * self.lora_scale
        return y

def rows_of(x):
    """(B, T, C) -> (B T, C), not recorded as a view: torch.compile compiles anew for each kind."""
    return torch.ops.aten._unsafe_view(x.contiguous(), (-1, x.shape[-1]))

class Block(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.ln_1 = nn.LayerNorm(width)
        self.attn = nn.ModuleDict({"c_attn": Conv1D(width, 3 * width),
                                   "c_proj": Conv1D(width, width)})
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = nn.ModuleDict({"c_fc": Conv1D(width, 4 * width),
                                  "c_proj": Conv1D(4 * width, width)})

    def before(self, x):
        """(N, C) -> (N, 3C): queries, keys and values."""
        return self.attn.c_attn(self.ln_1(x))

    def after(self, x, y):
        """The residual stream (N, C) and what attention found -> the stream after the block."""
        x = x + self.attn.c_proj(y)
        inner = F.gelu(self.mlp.c_fc(self.ln_2(x)), approximate="tanh")
        return x + self.mlp.c_proj(inner)

    def compile(self, **how):
        """Compile all but attention, which has a kernel of its own. Functions of rows (N, C) are
        compiled once for prefixes, thoughts and answers."""
        self.before = torch.compile(self.before, dynamic=True, **how)
        self.after = torch.compile(self.after, dynamic=True, **how)

    def forward(self, x, past, mask, last):
        """x (B, T, C) -> the stream of the last positions (B, last, C); new keys and values.

        past: keys and values of segments, each (B, H, S, C/H); mask bool (B, 1, T, S+T), or
        None: causal attention, or one query that sees all.
        """
        B, T, C = x.shape
        qkv = self.before(rows_of(x)).view(B, T, 3, self.heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, H, T, C/H)
        new = k, v
        if past:
            k = torch.cat([keys for keys, _ in past] + [k], dim=2)  # (B, H, S+T, C/H)
            v = torch.cat([values for _, values in past] + [v], dim=2)
        causal = mask is None and last > 1
        seen = None if mask is None else mask[:, :, T - last:]
        y = F.scaled_dot_product_attention(q[:, :, T - last:], k, v, seen, is_causal=causal)
        y = y.transpose(1, 2).reshape(B, last, C)
        x = self.after(rows_of(x[:, T - last:]), rows_of(y))
        return x.view(B, last, C), new

class Segment(NamedTuple):
    """Some positions, as later ones see them."""
    kv: tuple  # per layer: keys and values, each (B, H, S, C/H)
    valid: torch.Tensor | None = None  # (B, S) bool: which may be attended to; None: all

    def map(self, change):
        """The segment with every tensor changed."""
        kv = tuple((change(k), change(v)) for k, v in self.kv)
        return Segment(kv, None if self.valid is None else change(self.valid))

def attention_mask(x, past, valid, last):
    """Bool (B, 1, T, S+T), True where a query may see a key. None where it need not be told: one
    query that may see all, or causal attention with nothing before."""
    B, T, _ = x.shape
    known = [(segment.valid, segment.kv[0][0].shape[2]) for segment in past] + [(valid, T)]
    S = sum(length for _, length in known[:-1])
    padded = any(seen is not None for seen, _ in known)
    if not padded and (T == 1 or S == 0 and last in (1, T)):
        return None
    seen = [x.new_ones(B, n, dtype=torch.bool) if v is None else v for v, n in known]
    causal = x.new_ones(T, S + T, dtype=torch.bool).tril(diagonal=S)
    itself = causal.triu(diagonal=S)  # of padding, too: a softmax over nothing would be NaN
    return (causal & (torch.cat(seen, dim=1)[:, None] | itself))[:, None]

def injected(x, vectors, place):
    """x (B, T, C) with readings (B, C) added at a place: h' = h + scale * ||h|| * v / ||v||."""
    strength = SCALE * x[:, place].norm(dim=-1, keepdim=True)
    norm = vectors.norm(dim=-1, keepdim=True).clamp_min(1e-8)
    added = (strength * vectors / norm).to(x.dtype)[:, None]  # (B, 1, C)
    return x + F.pad(added, (0, 0, place, x.shape[1] - place - 1))

class GPT(nn.Module):
    def __init__(self, n_vocab, layers, heads, width, positions, read):
        """read: the layer whose residual stream is kept."""
        super().__init__()
        self.read = read
        self.wte = nn.Embedding(n_vocab, width)
        self.wpe = nn.Embedding(positions, width)
        self.h = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.ln_f = nn.LayerNorm(width)
        # 0.018 at GPT-2's width of 768 (GPT-2: 0.02); scaled so, small widths start as well.
        # Residual branches end in smaller weights (GPT-2, section 2.3).
        std = 0.5 / math.sqrt(width)
        smaller = {"wpe": 0.5, "c_proj": 1 / math.sqrt(2 * layers)}
        for name, p in self.named_parameters():
            if p.ndim == 2:
                nn.init.normal_(p, std=std * smaller.get(name.split(".")[-2], 1))

    def forward(self, x, past=(), pos=0, valid=None, inject=None, place=0, last=None):
        """Run embeddings through the blocks, after what the segments in `past` hold.

        x (B, T, C): token embeddings or thoughts, without positions; pos: position of the first
        one, an int or (B, 1); valid (B, T) bool: False at padding; inject: readings (B, C), added
        at `place`, one layer before self.read; last: how many hidden states, from the end.
        -> hidden states after ln_f (B, last, C); the new Segment; the residual stream at layer
        self.read (B, T, C), but (B, last, C) after the last block.
        """
        T = x.shape[1]
        last = last or T
        # Real tokens alone count. Padding before the first one may be at -1, and text may run away.
        counted = x.new_ones(1, T, dtype=torch.long) if valid is None else valid
        x = x + self.wpe((pos + counted.cumsum(1) - 1).clamp(0, len(self.wpe.weight) - 1))
        mask = attention_mask(x, past, valid, last)
        kv, stream = [], None
        for layer, block in enumerate(self.h):
            if inject is not None and layer == max(self.read - 1, 0):
                x = injected(x, inject, place)
            if layer == self.read:
                stream = x
            wanted = last if layer == len(self.h) - 1 else T  # the last block: what is read of it
            x, new = block(x, [segment.kv[layer] for segment in past], mask, wanted)
            kv.append(new)
        stream = x if self.read == len(self.h) else stream
        return self.ln_f(x), Segment(tuple(kv), valid), stream

    def logits(self, hidden):
        """Hidden states (..., C) -> logits (..., V); the head is tied to the token embedding."""
        return F.linear(hidden, self.wte.weight)

@contextmanager
def precision(run, model):
    """The precision of training: bfloat16 matrix products where asked for, float32 weights."""
    low = run.cfg.dtype == "bfloat16"
    cast = [m for m in model.modules() if low and isinstance(m, Conv1D) and m.cast is None]
    # The CPU's fused attention is slow backwards in bfloat16: 87 ms, plain products 19.
    plain = sdpa_kernel(SDPBackend.MATH) if low and run.cfg.device == "cpu" else nullcontext()
    with torch.autocast(run.cfg.device, torch.bfloat16, enabled=low), plain:
        # Once a step: autocast would cast once a thought (GPT-2 small, 16 thoughts: 3.4 s and
        # 5.4 GB a step in place of 2.3 and 2.6).
        for module in cast:
            module.cast = module.weight.bfloat16()
        try:
            yield
        finally:
            for module in cast:
                module.cast = None

@contextmanager
def evaluating(run, model):
    """Around everything that measures: no gradients, and the precision of training."""
    with torch.no_grad(), precision(run, model):
        yield

def token_loss(logits, target):
    """Nats a token: cross-entropy, averaged over each row's targets and then over the rows, so
    that the losses of a step's batches may be averaged."""
    nats = F.cross_entropy(logits.flatten(0, 1).float(), target.flatten(),
                           ignore_index=IGNORE, reduction="none").view(target.shape)
    return (nats.sum(1) / (target != IGNORE).sum(1)).mean()

def all_right(logits, target):
    """Rows (B,) whose every target token has the highest logit, as 0. or 1."""
    return ((logits.argmax(-1) == target) | (target == IGNORE)).all(dim=1).float()

# --------------------------------------------------------------------------------------------------
# 5. Thinking, and giving thoughts

class Thought(NamedTuple):
    """One latent position of a batch of problems, as a thing that can be held and given."""
    seen: Segment  # its keys and values: all that later positions see of it
    hidden: torch.Tensor  # (B, 1, C) its last hidden state: what the next thought is fed
    reading: torch.Tensor  # (B, C) the residual stream at the layer read

    def map(self, change):
        """The thought with every tensor changed."""
        return Thought(self.seen.map(change), change(self.hidden), change(self.reading))

    def roll(self, shift=1):
        """To each problem the thought of the row before, or so many before."""
        return self.map(lambda x: x.roll(shift, 0))

class Prompt(NamedTuple):
    """What a model has read and goes on from: problems up to the first thought, or a question."""
    past: list  # segments: what was read, then each token that the model wrote
    hidden: torch.Tensor  # (B, 1, C) the last hidden state: what the first thought is fed
    end: int | torch.Tensor  # the next position, an int or (B, 1)
    pause: torch.Tensor | None = None  # (C,) what every thought is fed instead
    bottleneck: bool = False  # the answer is not to see the problem

    def for_answer(self, thoughts):
        """What the answer sees -> segments, and its position."""
        past = [thought.seen for thought in thoughts]
        return past if self.bottleneck else self.past + past, self.end + len(thoughts)

def think(model, prompt, count, given={}):
    """Think `count` thoughts (Coconut, section 3) -> a list of Thoughts. Gradients pass through.

    given {slot: Thought}: taken as it stands, whatever the problem is, as columns() takes a given
    step: with keys and values from its own problem, which is not itself attended to. Later thoughts
    see it and go on from its hidden state. (In the last stage alone: there thought i is slot i.)
    """
    thoughts, hidden = [], prompt.hidden
    for slot in range(count):
        if slot in given:
            thought = given[slot]
        else:
            x = hidden if prompt.pause is None else prompt.pause.expand_as(hidden)
            past = [*prompt.past, *(earlier.seen for earlier in thoughts)]
            state, seen, stream = model(x, past, prompt.end + slot)
            thought = Thought(seen, state, stream[:, 0])
        thoughts.append(thought)
        hidden = thought.hidden
    return thoughts

def readings_of(thoughts):
    """(B, K, C)."""
    return torch.stack([thought.reading for thought in thoughts], dim=1)

def plan(run, slots, stage):
    """A stage ("0", "1", ..., "all") of problems of so many slots -> text steps, thoughts."""
    last = slots if stage == "all" else min(int(stage), slots)
    return slots - last, (last if run.cfg.kind.latent else 0)

def encode(run, model, batch, stage="all", last=1):
    """Read a batch -> Prompt, and the last hidden states (B, last, C)."""
    hidden, segment, _ = model(model.wte(batch.prefix), valid=batch.valid, last=last)
    end = batch.prefix.shape[1] if batch.valid is None else batch.valid.sum(1, keepdim=True)
    pause = model.wte.weight[run.text.bot] if run.cfg.kind.pause else None
    bottleneck = run.cfg.kind.bottleneck and stage == "all"
    return Prompt([segment], hidden[:, -1:], end, pause, bottleneck), hidden

def write(model, prompt, stop, limit, times=1):
    """Greedy text, until each row has written `stop` so many times, or `limit` tokens.

    -> ids (B, <= limit), -1 after a row's end, and the Prompt after them.
    """
    hidden, end, past = prompt.hidden, prompt.end, list(prompt.past)
    left = torch.full((len(hidden),), times, device=hidden.device)
    written = []
    for _ in range(limit):
        alive = left > 0
        if not alive.any():
            break
        token = model.logits(hidden[:, 0]).argmax(-1)
        written.append(torch.where(alive, token, -1))
        left = left - ((token == stop) & alive).long()
        new, segment, _ = model(model.wte(token)[:, None], past, end, valid=alive[:, None])
        hidden = torch.where(alive[:, None, None], new, hidden)
        end = end + alive[:, None].long()
        past.append(segment)
    ids = torch.stack(written, dim=1) if written else left.new_zeros(len(left), 0)
    return ids, prompt._replace(past=past, hidden=hidden, end=end)

def think_through(run, model, problems, given={}, stage="all"):
    """Problems of one size, read and thought as at a stage, whose text steps the model writes
    itself -> Prompt, list of Thoughts."""
    works = [run.task.work(problem) for problem in problems]  # only how many steps matters here
    n_text, count = plan(run, len(works[0]), stage)
    with evaluating(run, model):
        prompt, _ = encode(run, model, make_batch(run, problems, works, 0), stage)
        limit = n_text * (run.longest + 1)
        _, prompt = write(model, prompt, run.text.sep, limit, times=n_text)
        return prompt, think(model, prompt, count, given)

def answer(run, model, prompt, thoughts):
    """Greedy answers after these thoughts, a list of text. "..." stands for a missing end."""
    text = run.text
    with evaluating(run, model):
        past, end = prompt.for_answer(thoughts)
        eot = torch.full((len(prompt.hidden), 1), text.eot, device=prompt.hidden.device)
        hidden, segment, _ = model(model.wte(eot), past, end)
        begun = Prompt([*past, segment], hidden, end + 1)
        ids, _ = write(model, begun, text.eos, run.longest + 2)
    return [text.show(row) + "..." * (text.eos not in row) for row in ids.tolist()]

# --------------------------------------------------------------------------------------------------
# 6. Reading (Activation Oracles, section 3): the question, the answer, LoRA

class Whitener:
    """Readings, centred and of unit variance in all directions.

    Thoughts vary by orders of magnitude more along what the model uses than along the rest, and
    injected as they are, the rest is lost. ZCA (Kessy et al. 2018) is the whitening that stays
    closest to the residual stream's own axes.
    """

    def __init__(self, readings):
        """readings: (N, C) of training problems. In float64, which autocast leaves alone."""
        x = readings.double()
        self.mean = x.mean(0)
        variance, axes = torch.linalg.eigh(torch.cov(x.T))
        spread = variance.clamp_min(0) + 1e-6 * variance.max()
        self.zca = (axes * spread.rsqrt()) @ axes.T  # (C, C)

    def __call__(self, readings):
        """(..., C) -> the same shape."""
        return ((readings.double() - self.mean) @ self.zca).float()

class Oracle(NamedTuple):
    """A model that reads thoughts, and how readings are prepared for it (None: as they are)."""
    model: GPT
    white: Whitener | None = None

def consult(run, model, questions, vectors, said):
    """Ask questions, one a row, about readings (B, C), and go on with the tokens said (B, T') after
    them -> Prompt, whose hidden states are those from <act> on, (B, 1 + T', C).

    A prompt is the question and <act>: so a question that many rows ask is computed once, and its
    keys and values are shared. <act> is at the same position for all, an eighth of those there are:
    where it was not, saying was learnt anew for each length of question.
    """
    unique = list(dict.fromkeys(questions))
    asked = [run.text.ids(f"{question} Layer {run.cfg.layer}:") for question in unique]
    ids = put(pad(asked, run.text.eos, left=True), said.device)
    valid = ids != run.text.eos
    act_at = run.cfg.size.positions // 8
    if ids.shape[1] > act_at:
        raise UserError(f"a question takes {ids.shape[1]} tokens, of at most {act_at}")
    begin = act_at - valid.sum(1, keepdim=True)
    # last=2, of which nothing is used: a tensor of one row would be compiled anew
    _, segment, _ = model(model.wte(ids), (), begin, valid, last=2)
    which = put([unique.index(question) for question in questions], said.device)
    # index_select: on a CPU the backward of x[which] sums in any order, so that runs would differ
    segment = segment.map(lambda x: x.index_select(0, which))
    tail = F.pad(said, (1, 0), value=run.text.act)
    begin = torch.full_like(tail[:, :1], act_at)
    hidden, new, _ = model(model.wte(tail), [segment], begin, inject=vectors)
    return Prompt([segment, new], hidden, begin + tail.shape[1])

def oracle_loss(run, model, questions, targets, vectors, most=None):
    """Nats a token of what should be said (a list of text), at most its first `most` tokens, and
    (B,) 1. where all of these are right."""
    eos = run.text.eos
    ids = pad([(*run.text.ids(target), eos) for target in targets], IGNORE)
    target = put(ids[:, :most], vectors.device)
    said = target[:, :-1].masked_fill(target[:, :-1] == IGNORE, eos)
    logits = model.logits(consult(run, model, questions, vectors, said).hidden)
    return token_loss(logits, target), all_right(logits, target)

def ask(run, oracle, readings, question=None):
    """Greedy answers, a list of text, to one question (default: the step, in the wording never
    trained on) about readings (N, C)."""
    answers, eos, n = [], run.text.eos, len(readings)
    question = question or run.text.test_wording["step"]
    # a batch of one row would be compiled anew
    readings = readings.expand(2, -1) if n == 1 else readings
    for chunk in readings.tensor_split(math.ceil(n / 1000)):
        vectors = oracle.white(chunk) if oracle.white else chunk.float()
        nothing = chunk.new_zeros(len(chunk), 0, dtype=torch.long)
        with evaluating(run, oracle.model):
            asked = consult(run, oracle.model, [question] * len(chunk), vectors, nothing)
            ids, _ = write(oracle.model, asked, eos, run.longest + 2)
        answers += [run.text.show(row) for row in ids.tolist()]
    return answers[:n]

def truth(task, problem, steps, slot, family):
    """What a question of this family about the thought of a slot should be answered."""
    if family in task.FIELDS:
        fields = task.fields(steps[slot])
        return str(fields[family]) if fields else "none"
    return {"step": task.say(steps[slot]), "slot": str(slot), "answer": task.spell(steps),
            "problem": task.text(problem)}[family]

def readable(task, rng, works, low=0):
    """As many thoughts, of slots from `low` on, as there are works, for a reader in training ->
    rows, slots (arrays). Never one whose step is never read."""
    places, final = [], len(works[0]) - 1
    for row, steps in enumerate(works):
        for slot in range(low, final + 1):
            if not task.never_read(steps[slot]):
                # half as many last ones: of sums, final carries, which have two forms
                places += [(row, slot)] * (1 if slot == final else 2)
    return rng.choice(places, size=len(works)).T

def draw_questions(run, rng, families, problems, works, low=0):
    """As many questions as works, about thoughts drawn from them: of their step and, a few, of each
    other family -> questions, targets, rows and slots of the thoughts (the last slot, if about the
    whole)."""
    others = len(families) - 1
    drawn = rng.choice(families, size=len(works), p=[1 - OTHER * others] + [OTHER] * others)
    # one wording a family and batch: fewer prompts
    wording = {family: str(rng.choice(run.text.wordings[family])) for family in families}
    rows, slots = readable(run.task, rng, works, low)
    questions, targets = [], []
    for n, (family, row) in enumerate(zip(drawn.tolist(), rows)):
        if family in WHOLE:
            if any(map(run.task.never_read, works[row])):
                family = "step"  # the whole problem would tell what is never to be read
            else:
                slots[n] = len(works[row]) - 1
        questions.append(wording[family])
        targets.append(truth(run.task, problems[row], works[row], slots[n], family))
    return questions, targets, rows, slots

def pick(readings, rows, slots):
    """Readings (B, K, C) of some rows and slots -> (N, C). By index_select, as in consult()."""
    where = put(rows * readings.shape[1] + slots, readings.device)
    return readings.flatten(0, 1).index_select(0, where)

def add_lora(model):
    """Freeze the model and give every block matrix an adapter W + 2 A B (LoRA, section 4.1, alpha
    twice the rank). B starts at zero, so that the model is unchanged at first."""
    model.requires_grad_(False)
    for module in model.modules():
        if isinstance(module, Conv1D):
            (n_in, n_out), like = module.weight.shape, module.weight
            module.lora_a = nn.Parameter(like.new_empty(n_in, LORA_RANK).normal_() / n_in**0.5)
            module.lora_b = nn.Parameter(like.new_zeros(LORA_RANK, n_out))
            module.lora_scale = 2.0

# --------------------------------------------------------------------------------------------------
# 7. One training loop, models in their folders, checkpoints

def shapes_of(run, n_vocab=None):
    """Name -> shape of the whole state dict."""
    layers, _, width, positions = run.cfg.size
    return gpt2_weights.gpt2_shapes(layers, width, n_vocab or run.text.n_vocab, positions)

def released(cfg, files=gpt2_weights.FILES):
    """The folder with GPT-2's released files. Raises UserError."""
    return Path(cfg.weights) if cfg.weights else gpt2_weights.fetch(cfg.model, files)

def released_weights(run):
    """State dict of the released GPT-2, with rows for the special tokens."""
    path = released(run.cfg) / "model.safetensors"
    weights = read_safetensors(path, shapes_of(run, run.text.eos + 1))
    wte = weights["wte.weight"]
    like = [run.text.ids(token)[0] for token in SPECIAL.values()]
    return {**weights, "wte.weight": torch.cat([wte, wte[like]])}

def new_model(run, weights=None):
    """A model with random weights, a function of --seed, or with these. With --compile the blocks
    are compiled in place, which leaves the state dict's names alone."""
    cfg = run.cfg
    # "meta" allocates nothing for weights that are replaced. Its first use imports for 1.4 s.
    with torch.device("meta" if weights and cfg.size.width >= 768 else "cpu"):
        torch.manual_seed(cfg.seed)
        model = GPT(run.text.n_vocab, *cfg.size, cfg.layer)
    torch.manual_seed(cfg.seed)  # for adapters
    if weights:
        weights = {name: tensor.float() for name, tensor in weights.items()}
        model.load_state_dict(weights, assign=True)
    if cfg.compile:
        torch._dynamo.config.fail_on_recompile_limit_hit = True  # never back to eager in silence
        for block in model.h:
            block.compile()
    return model.to(cfg.device)

def trained(model):
    """What is trained of a model, by name: all of it, or its adapter."""
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}

def load_model(run, name):
    """A finished part's model; "lora" is the base with its adapter. Raises UserError."""
    path = run.out / ("base" if name == "lora" else name) / "model.safetensors"
    model = new_model(run, read_safetensors(path, shapes_of(run)))
    if name == "lora":
        add_lora(model)
        shapes = {key: x.shape for key, x in trained(model).items()}
        adapter = gpt2_weights.read_adapter(run.out / name, shapes, 2 * LORA_RANK)
        model.load_state_dict(adapter, strict=False)
    return model

def save_model(run, name, model):
    """OUT/NAME, a Hugging Face folder, or an adapter in PEFT's layout. Its weights come last."""
    cfg, text, out = run.cfg, run.text, run.out / name
    if name == "lora":
        base = str(run.out / "base")
        gpt2_weights.save_adapter(out, trained(model), LORA_RANK, 2 * LORA_RANK, base)
    else:
        gpt2_weights.save_model(out, model.state_dict(), cfg.size.heads, text.ranks, text.PATTERN,
                                text.special)

class Loss(NamedTuple):
    total: torch.Tensor  # what is trained on
    nats: torch.Tensor  # nats a token of what the model must write
    right: torch.Tensor  # (B,) 1. where the answer, or what an oracle is to say, is all right

class Muon(torch.optim.Optimizer):
    """SGD with Nesterov momentum whose steps are made orthogonal by 5 Newton-Schulz steps (Jordan
    et al. 2024), in the precision of training. torch.optim.Muon does the same in bfloat16 alone,
    which most CPUs emulate. A step is scaled by sqrt(rows / columns) where there are more rows."""

    def __init__(self, params, lr, weight_decay, dtype):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})
        self.dtype = dtype

    @torch.no_grad()
    def step(self):
        (group,) = self.param_groups
        alike = defaultdict(list)
        for p in group["params"]:
            if p.grad is not None:
                alike[p.shape].append(p)
        for (n_in, n_out), matrices in alike.items():  # all of one shape at once
            updates = []
            for p in matrices:
                if not self.state[p]:
                    self.state[p]["momentum"] = torch.zeros_like(p)
                momentum = self.state[p]["momentum"].lerp_(p.grad, 0.05)
                updates.append(p.grad.lerp(momentum, 0.95))
            alpha = group["lr"] * max(1, n_in / n_out) ** 0.5
            for p, update in zip(matrices, self.orthogonal(torch.stack(updates))):
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.sub_(update, alpha=alpha)

    def orthogonal(self, x):
        """Matrices (n, rows, columns) with all singular values brought near 1."""
        x = x.to(self.dtype)
        tall = x.shape[1] > x.shape[2]
        x = x.mT if tall else x
        x = x / x.norm(dim=(1, 2), keepdim=True).clamp_min(1e-7)
        for _ in range(5):
            gram = x @ x.mT
            inner = torch.baddbmm(gram, gram, gram, beta=-4.775, alpha=2.0315)
            x = torch.baddbmm(x, inner, x, beta=3.4445)
        return x.mT if tall else x

def make_optimizers(run, model, recipe):
    """AdamW, and Muon on the blocks' matrices where its rate is not 0."""
    matrices, rest, optimizers = [], [], []
    for name, p in model.named_parameters():
        if p.requires_grad:
            is_matrix = recipe.muon and p.ndim == 2 and name.startswith("h.")
            (matrices if is_matrix else rest).append(p)
    if rest:
        optimizers.append(torch.optim.AdamW(
            rest, lr=recipe.adam, betas=(0.9, 0.98), weight_decay=recipe.decay, fused=True))
    if matrices:
        dtype = getattr(torch, run.cfg.dtype)
        optimizers.append(Muon(matrices, recipe.muon, recipe.decay, dtype))
    return optimizers

def train_step(run, model, optimizers, phase, step, loss_of):
    """One update by the losses of some batches, which count alike whatever their sizes -> [nats,
    share right], examples. loss_of(step, rng) -> Loss, of one batch. Raises UserError where the
    gradient is not finite."""
    batches, examples = run.cfg.accumulate, 0
    stats = torch.zeros(2, device=run.cfg.device)
    for batch in range(batches):
        with precision(run, model):
            loss = loss_of(step, rng_of(run.cfg.seed, phase, step, batch))
        (loss.total / batches).backward()
        stats += torch.stack([loss.nats.detach(), loss.right.mean()]) / batches
        examples += len(loss.right)
    if not nn.utils.clip_grad_norm_(model.parameters(), 1.0).isfinite():
        raise UserError("a gradient is not finite: --resume with --dtype float32, or begin again "
                        "with lower rates (section 2)")
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return stats, examples

def log(run, phase, step, steps, nats, right, speed, left):
    """One line on the terminal and one object in log.jsonl, of the steps since the last one."""
    print(f"{phase:<11} | step {step:>5}/{steps} | loss {nats:5.3f} | exact {right:4.2f} | "
          f"{speed:5,.0f} ex/s | eta {int(left) // 60}:{int(left) % 60:02d}", flush=True)
    entry = {"phase": phase, "step": step, "steps": steps, "loss": round(nats, 6),
             "exact": round(right, 6), "ex_per_s": round(speed, 1)}
    path = run.out / "log.jsonl"
    earlier = path.read_text() if path.exists() else ""
    write_atomic(path, f"{earlier}{json.dumps(entry)}\n")

def save_last(run, phase, step, model, optimizers):
    """last.pt: where the run stands, for --resume. Replaced whole."""
    path = run.out / "last.pt"
    state = {"phase": phase, "step": step, "seconds": time.time() - run.start,
             "params": trained(model),
             "optimizers": [optimizer.state_dict() for optimizer in optimizers]}
    with one_line(path, "make room, then --resume"), gpt2_weights.replacing(path) as file:
        torch.save(state, file)

def load_last(run):
    """With --resume, the content of last.pt, {} without one. Raises UserError on a damaged file."""
    path = run.out / "last.pt"
    if not run.cfg.resume or not path.exists():
        return {}
    advice = "delete it, then --resume trains the unfinished part again"
    with one_line(f"{path} is damaged", advice):
        if zipfile.ZipFile(path).testzip():  # torch.load does not look at the checksums
            raise ValueError("altered")
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)

def fit(run, phase, model, steps, recipe, loss_of):
    """The training loop of every part: the rate is the lesser of a linear warm-up over 50
    steps and a linear decay from the first step on. loss_of: as in train_step()."""
    optimizers = make_optimizers(run, model, recipe)
    peaks = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    first, checkpoint = 0, load_last(run)
    if checkpoint.get("phase") == phase:
        first = checkpoint["step"]
        model.load_state_dict(checkpoint["params"], strict=False)  # a LoRA's base is not among them
        for optimizer, state in zip(optimizers, checkpoint["optimizers"], strict=True):
            optimizer.load_state_dict(state)
    sums, count, seen = torch.zeros(2, device=run.cfg.device), 0, 0
    begin = logged = saved = time.time()
    for step in range(first, steps):
        for optimizer, peak in zip(optimizers, peaks):
            optimizer.param_groups[0]["lr"] = peak * min((step + 1) / 50, 1 - step / steps)
        stats, examples = train_step(run, model, optimizers, phase, step, loss_of)
        sums, count, seen = sums + stats, count + 1, seen + examples
        now = time.time()
        if (step + 1) % LOG_EVERY == 0 or step + 1 == steps:
            left = (now - begin) / (step + 1 - first) * (steps - step - 1)
            log(run, phase, step + 1, steps, *(sums / count).tolist(), seen / (now - logged), left)
            sums, count, seen, logged = torch.zeros_like(sums), 0, 0, now
        if now > saved + SAVE_EVERY or step + 1 == steps:
            save_last(run, phase, step + 1, model, optimizers)
            saved = time.time()

def load_json(path):
    """The object in a JSON file, {} without one. Raises UserError on a damaged file."""
    with one_line(path, "restore it, or choose another --out"):  # and {**x} on what is no object
        return {**json.loads(path.read_text())} if path.exists() else {}

def record(run, *place, **entries):
    """Put entries into results.json, or at a place in it, `"coconut", "stages", "0"`: instead of
    those of the same name, beside the others -> all of it."""
    results = section = load_json(run.out / "results.json")
    for name in place:
        section = section.setdefault(name, {})
    section.update(entries)
    write_atomic(run.out / "results.json", json.dumps(results, indent=1) + "\n")
    return results

def wilson(p, n):
    """A share p of n -> a rate, with its Wilson 95% interval (1927)."""
    z = 1.959964  # 95% of the normal distribution lie within z
    middle = (n * p + z * z / 2) / (n + z * z)
    half = z * math.sqrt(n * p * (1 - p) + z * z / 4) / (n + z * z)
    low, high = max(0.0, min(p, middle - half)), min(1.0, max(p, middle + half))
    return {"exact": p, "n": n, "ci95": [low, high]}

def rate(hits):
    """Booleans -> a rate."""
    return wilson(float(np.mean(hits)) if len(hits) else 0.0, len(hits))

def rates_of(hits):
    """{key: booleans} -> {key: rate}, in order."""
    return {str(key): rate(hits[key]) for key in sorted(hits)}

def show_rate(r):
    low, high = r["ci95"]
    return f"{r['exact']:.3f} [{low:.3f}, {high:.3f}] n={r['n']}" if r["n"] else "-"

# --------------------------------------------------------------------------------------------------
# 8. Coconut: from text steps to thoughts, and to thoughts that mean what they say

def rows_before(rows, shift=1):
    """To each row the one so many before, as Thought.roll()."""
    return [rows[(row - shift) % len(rows)] for row in range(len(rows))]

def work_all(task, problems, donors={}):
    """Problems worked by hand, with the steps of some slots given by donors {slot: as many
    problems} -> lists of steps."""
    works = []
    for row, problem in enumerate(problems):
        given = {slot: task.work(others[row])[slot] for slot, others in donors.items()}
        works.append(task.work(problem, given) if given else task.work(problem))
    return works

def explain_loss(run, model, rng, problems, works, thoughts, given_slots=()):
    """Nats a token of what the model says, asked as an oracle is, of --explain thoughts a problem
    (0.5: half as many as problems, of every second one): unwhitened, and with gradients into
    them. works: the steps trained on, given ones included; the last ones are thoughts. Half of the
    time no thought before the first one given is asked about. (SIM-CoT, arXiv 2509.20317, has a
    decoder of its own.)
    """
    each = run.cfg.explain
    chosen = np.arange(math.ceil(each * len(problems))) / each  # cut to rows below
    chosen = chosen.astype(int) % len(problems)  # 0.68 * 75 is more than 51
    problems, works = [problems[row] for row in chosen], [works[row] for row in chosen]
    n_text = len(works[0]) - len(thoughts)
    low = n_text
    if given_slots and rng.random() >= 0.5:
        low = max(given_slots[0], n_text)
    asked = sum([steps[low:] for steps in works], [])
    if all(map(run.task.never_read, asked)):
        return torch.zeros((), device=run.cfg.device)
    questions, targets, rows, slots = draw_questions(
        run, rng, run.text.of_thoughts, problems, works, low)
    vectors = pick(readings_of(thoughts), chosen[rows], slots - n_text)
    return oracle_loss(run, model, questions, targets, vectors)[0]

def coconut_loss(run, model, stage, rng, n=None):
    """Loss of n fresh problems of one size at a stage: cross-entropy of what the model must write,
    its own text steps and the answer, never the problem's digits, and the explaining loss.

    Exchange (interchange intervention training, arXiv 2112.00826): in half of the batches the step
    of one slot (--given: of more) is the row before's: in the last stage its thought (earlier, it
    wrecks the learning), in mixed ones its text, in stage 0 none. What is trained is the sum worked
    with that step given; later thoughts are thought anew.
    """
    cfg, kind, task = run.cfg, run.cfg.kind, run.task
    problems = task.draw(rng, TRAIN, int(rng.choice(cfg.digits)), n or cfg.batch_size)
    n_text, count = plan(run, len(task.work(problems[0])), stage)
    slots, given = [], {}
    # how many slots may be given: in stage 0 none, in the last stage thoughts, else text steps
    may_give = 0 if stage == "0" else count if stage == "all" else n_text
    if kind.exchange and run.exchanges and may_give and rng.random() < 0.5:
        # the last twice as often: of sums' thoughts, the final carry, which is often the same
        one = min(int(rng.integers(may_give + 1)), may_give - 1)
        slots = sorted({one, *rng.integers(may_give, size=rng.integers(cfg.given)).tolist()})
    donors = {slot: rows_before(problems, shift) for shift, slot in enumerate(slots, 1)}
    works = work_all(task, problems, donors)
    batch = make_batch(run, problems, works, n_text, slots)
    n_targets = batch.text_target.shape[1]  # of text: 0 in the last stage
    prompt, hidden = encode(run, model, batch, stage, last=max(n_targets, 1))
    if slots and stage == "all":
        own = think(model, prompt, slots[-1] + 1)
        given = dict(enumerate(own[:slots[0]]))  # up to the first one: not thought twice
        for shift, slot in enumerate(slots, 1):
            given[slot] = own[slot].roll(shift)
    thoughts = think(model, prompt, count, given)
    answered, _, _ = model(model.wte(batch.answer), *prompt.for_answer(thoughts))
    # logits only where they are used
    logits = model.logits(torch.cat([hidden[:, :n_targets], answered], dim=1))
    total = nats = token_loss(logits, torch.cat([batch.text_target, batch.answer_target], dim=1))
    if kind.explain and count:
        told = explain_loss(run, model, rng, problems, works, thoughts, slots)
        total = nats + cfg.explain * told  # each thought counts as much as an answer
    return Loss(total, nats, all_right(logits[:, n_targets:], batch.answer_target))

def held_out(run, most, n=None):
    """The problems of every evaluation, or about n of them, in batches of one size, of at most so
    many."""
    cfg, batches = run.cfg, []
    n = min(n or cfg.eval_problems, cfg.eval_problems)
    each = max(4, math.ceil(n / len(cfg.digits)))  # exchanges need three other problems
    for size in cfg.digits:
        problems = run.task.draw(rng_of(cfg.seed, cfg.split, size), cfg.split, size, each)
        parts = math.ceil(len(problems) / most)
        batches += [problems[part::parts] for part in range(parts)]
    return batches

class Solved(NamedTuple):
    """Problems of one size, thought by the model and worked by hand, perhaps with steps given."""
    problems: list
    works: list  # their steps, by hand
    prompt: Prompt
    thoughts: list
    answers: list  # the model's
    donors: dict = {}  # {slot: as many problems, whose thoughts, and steps, are given}

def solve(run, model, problems, donors={}, stage="all"):
    """Think problems and work them by hand. At the last stage, the thoughts, and steps, of some
    slots may be given by donors {slot: as many problems}. -> Solved. All answers, iia figures,
    examples and ask are made of this experiment."""
    given = {slot: think_through(run, model, others)[1][slot] for slot, others in donors.items()}
    works = work_all(run.task, problems, donors)
    prompt, thoughts = think_through(run, model, problems, given, stage=stage)
    answers = answer(run, model, prompt, thoughts)
    return Solved(problems, works, prompt, thoughts, answers, donors)

def as_worked(run, solved):
    """Whether each answer is what the hand-worked steps spell."""
    return [now == run.task.spell(steps) for now, steps in zip(solved.answers, solved.works)]

def stage_scores(run, model, stage="all", n=None):
    """Held-out problems answered at a stage, autoregressively, from the problem alone -> a rate,
    with "by_digits", and a problem's tokens (or thoughts) before the answer and seconds."""
    hits, tokens, batches = defaultdict(list), 0, held_out(run, 250, n)
    begin = time.time()
    for problems in batches:
        solved = solve(run, model, problems, stage=stage)
        tokens += sum(int(token.valid.sum()) for token in solved.prompt.past[1:])
        tokens += len(solved.thoughts) * len(problems)
        hits[run.task.size(problems[0])] += as_worked(run, solved)
    every = sum(hits.values(), [])
    return {**rate(every), "by_digits": rates_of(hits), "split": run.cfg.split,
            "tokens": tokens / len(every), "seconds": (time.time() - begin) / len(every)}

def train_coconut(run):
    """The curriculum: text, then the last 1, 2, ... slots as thoughts, and "all": all slots, with
    all ingredients of the kind of thoughts. Each stage is measured before its first step and after
    its last one."""
    cfg = run.cfg
    model = new_model(run, released_weights(run) if cfg.pretrained else None)
    run.out.mkdir(parents=True, exist_ok=True)
    write_atomic(run.out / "config.json", json.dumps(cfg.knobs, indent=1) + "\n")
    if cfg.pretrained and not (run.out / "base" / "model.safetensors").exists():
        save_model(run, "base", model)
    # Thoughts that nobody explains are all thought with the problem in sight, too, before they must
    # do without: where they were not, one seed of five answered 0.70.
    in_sight = cfg.kind.bottleneck and not cfg.kind.explain
    mixed = {str(k): cfg.train_mixed * k for k in range(1, run.slots + in_sight)}
    steps = {"0": cfg.train_text, **mixed, "all": cfg.train_latent}
    stages, reached = [*steps], load_last(run).get("phase", "").removeprefix("coconut ")
    for stage in stages[stages.index(reached) if reached in stages else 0:]:
        if stage != reached:
            record(run, "coconut", "stages", stage, at_switch=stage_scores(run, model, stage, 200))

        def loss_of(step, rng):
            if stage == "all" and rng.random() < AGAIN:
                return coconut_loss(run, model, "0", rng, math.ceil(cfg.batch_size / 2))
            return coconut_loss(run, model, stage, rng)

        last = "explained" if cfg.kind.explain else "unexplained"
        recipe = cfg.recipes[last if stage == "all" else "text"]
        fit(run, f"coconut {stage}", model, steps[stage], recipe, loss_of)
        if stage == "0" and not cfg.pretrained:
            save_model(run, "base", model)
        scores = stage_scores(run, model, stage)
        print(f"coconut {stage:<3} | held-out exact match {show_rate(scores)}", flush=True)
        record(run, "coconut", "stages", stage, **scores)
    save_model(run, "coconut", model)

# --------------------------------------------------------------------------------------------------
# 9. Oracles that are trained: the original's self-oracle, and LoRA

def whitener_of(run, model):
    """The Whitener of a model's thoughts: a function of the model and of training problems."""
    readings = []
    for size in run.cfg.digits:
        problems = run.task.draw(rng_of(run.cfg.seed, "whiten", size), TRAIN, size, 1000)
        _, thoughts = think_through(run, model, problems)
        readings += [thought.reading for thought in thoughts]
    return Whitener(torch.cat(readings))

def pool_of(run, model, each=512, life=32):
    """Whitened thoughts of fresh problems for readers in training: `each` of every size, made anew
    every `life` steps. -> draw(step, rng, n), a function of the step: n problems of one size, their
    steps, readings (n, K, C). Problems of which nothing may be read are left out."""
    white, sizes = whitener_of(run, model), sorted(run.cfg.digits)

    @lru_cache(maxsize=len(sizes))
    def made(size, refill):
        rng = rng_of(run.cfg.seed, "pool", size, refill)
        drawn, readings = run.task.draw(rng, TRAIN, size, each), []
        problems = [problem for problem in drawn
                    if not all(map(run.task.never_read, run.task.work(problem)))]
        for start in range(0, len(problems), 1000):
            _, thoughts = think_through(run, model, problems[start:start + 1000])
            readings.append(white(readings_of(thoughts)))
        return problems, work_all(run.task, problems), torch.cat(readings)

    def draw(step, rng, n):
        shares = 2.0 ** np.arange(len(sizes))  # more of long problems: they are learnt later
        size = int(rng.choice(sizes, p=shares / shares.sum()))
        problems, works, readings = made(size, step // life)
        rows = rng.integers(len(problems), size=n)
        return [problems[row] for row in rows], [works[row] for row in rows], (
            readings.index_select(0, put(rows, readings.device)))

    return draw

def train_oracle(run, name="oracle"):
    """The original's self-oracle: the coconut, fine-tuned to read the thoughts of its frozen former
    self. Or "lora", a separate, frozen base model with an adapter, on thoughts of the same pool."""
    cfg, lora = run.cfg, name == "lora"
    draw = pool_of(run, load_model(run, "coconut"))
    model = load_model(run, "base" if lora else "coconut")
    if lora:
        add_lora(model)

    def loss_of(step, rng):
        problems, works, readings = draw(step, rng, cfg.batch_size)
        questions, targets, rows, slots = draw_questions(
            run, rng, run.text.families, problems, works)
        # Operands stand first and are learnt last: three updates of four go no further than half of
        # the longest text, which is quicker. What the log calls exact is of that half.
        most = max(1, run.longest // 2) if step % 4 else None
        vectors = pick(readings, rows, slots)
        loss, right = oracle_loss(run, model, questions, targets, vectors, most)
        total = loss
        if not lora and rng.random() < REHEARSAL:
            # All thoughts: after text alone (as in the original) no problem was still solved in
            # thoughts. Added to the loss, since every step of Muon is as large as any other.
            total = loss + coconut_loss(run, model, "all", rng, math.ceil(cfg.batch_size / 4)).total
        return Loss(total, loss, right)

    steps = cfg.train_lora if lora else cfg.train_oracle
    fit(run, name, model, steps, cfg.recipes["text"], loss_of)
    save_model(run, name, model)

def self_oracle(run, coconut):
    """Who reads a model's thoughts: itself, where thoughts explain themselves, else its copy."""
    if run.cfg.kind.explain:
        return Oracle(coconut)
    return Oracle(load_model(run, "oracle"), whitener_of(run, coconut))

# --------------------------------------------------------------------------------------------------
# 10. Probes: what a classifier of one or two layers finds in the same readings

PROBES = {"linear": 0, "mlp": 512}  # name: width of the hidden layer

def new_probes(run):
    """By name: classifiers of all fields of a step, side by side."""
    width, probes = run.cfg.size.width, nn.ModuleDict()
    for name, hidden in PROBES.items() if run.task.FIELDS else ():
        torch.manual_seed(run.cfg.seed)
        body = [nn.Linear(width, hidden), nn.GELU()] if hidden else []
        head = nn.Linear(hidden or width, sum(run.task.FIELDS.values()))
        probes[name] = nn.Sequential(*body, head)
    return probes.to(run.cfg.device)

def field_hits(run, probe, readings, steps):
    """Readings (N, C) and their steps -> cross-entropy, (N, fields) bool: found. A step
    without fields counts as found."""
    labels = []
    for step in steps:
        fields = run.task.fields(step) or dict.fromkeys(run.task.FIELDS, IGNORE)
        labels.append([fields[name] for name in run.task.FIELDS])
    labels = put(labels, readings.device)  # (N, fields)
    parts = probe(readings).split(list(run.task.FIELDS.values()), dim=1)
    loss = sum(F.cross_entropy(part.float(), label, ignore_index=IGNORE)
               for part, label in zip(parts, labels.T))
    found = torch.stack([part.argmax(1) for part in parts], dim=1)
    return loss, (found == labels) | (labels == IGNORE)

def train_probes(run):
    """Linear probes, and probes with one hidden layer."""
    # one large pool, never made anew: a small one would be learnt by heart
    draw, probes = pool_of(run, load_model(run, "coconut"), each=8000, life=2**31), new_probes(run)
    for name, probe in probes.items():
        def loss_of(step, rng):
            _, works, readings = draw(step, rng, 8 * run.cfg.batch_size)
            rows, slots = readable(run.task, rng, works)
            steps = [works[row][slot] for row, slot in zip(rows, slots)]
            loss, hits = field_hits(run, probe, pick(readings, rows, slots), steps)
            return Loss(loss, loss, hits.all(dim=1).float())

        fit(run, f"probes {name}", probe, run.cfg.train_probes, PROBE_RECIPE, loss_of)
    write_safetensors(run.out / "probes.safetensors", probes.state_dict())

# --------------------------------------------------------------------------------------------------
# 11. Evaluation: rates, readings and their controls, thoughts given

class Case(NamedTuple):
    """A held-out thought, by its place, and its step."""
    test: Solved
    slot: int
    row: int
    step: object

def cases_of(task, tests):
    """All thoughts -> Cases of steps that readers were trained on, and of those never read."""
    known, never = [], []
    for test in tests:
        for slot in range(len(test.thoughts)):
            for row, steps in enumerate(test.works):
                case = Case(test, slot, row, steps[slot])
                (never if task.never_read(case.step) else known).append(case)
    return known, never

def stack(cases, before=0):
    """Their readings (N, C), or, of the same slots, those of so many rows before."""
    return torch.stack([test.thoughts[slot].reading[row - before] for test, slot, row, _ in cases])

def step_scores(task, said, steps):
    """What was said of thoughts, against the steps that they stand for -> scores.

    token_f1: of the sets of white-space-separated words, as the original counts it.
    """
    gold = [task.say(step) for step in steps]
    inner = np.array([task.fields(step) is not None for step in steps])
    exact = np.array([s == g for s, g in zip(said, gold)])
    f1 = []
    for s, g in zip(said, gold):
        words, wanted = set(s.split()), set(g.split())
        f1.append(2 * len(words & wanted) / max(len(words) + len(wanted), 1))
    without = rate(exact[inner])
    scores = {**rate(exact), "exact_no_final": without["exact"], "n_no_final": without["n"],
              "token_f1": float(np.mean(f1))}
    for name in task.looser(gold[0]):
        same = [task.looser(s)[name] == task.looser(g)[name] for s, g in zip(said, gold)]
        scores[name] = rate(np.array(same)[inner])
    return scores

def oracle_scores(run, oracle, known, never, families):
    """All questions, each in the wording never trained on -> {family: scores or a rate}."""
    task, scores = run.task, {}
    for name, cases in (("step", known), ("never_read", never)):
        if cases:
            said = ask(run, oracle, stack(cases))
            scores[name] = step_scores(task, said, [case.step for case in cases])
    for family in families[1:]:
        asked = known
        if family in WHOLE:
            asked = [case for case in known if case.slot == len(case.test.thoughts) - 1
                     and not any(map(task.never_read, case.test.works[case.row]))]
        elif family in task.FIELDS:
            asked = [case for case in known if task.fields(case.step) is not None]
        if asked:
            gold = [truth(task, test.problems[row], test.works[row], slot, family)
                    for test, slot, row, _ in asked]
            said = ask(run, oracle, stack(asked), run.text.test_wording[family])
            scores[family] = rate([s == g for s, g in zip(said, gold)])
    return scores

def probe_scores(run, white, known):
    """How often probes find each field of a step, and all of them -> {probe: {field: rate}}."""
    inner = [case for case in known if run.task.fields(case.step) is not None]
    vectors = white(stack(inner))
    probes, scores = new_probes(run), {}
    shapes = {name: x.shape for name, x in probes.state_dict().items()}
    probes.load_state_dict(read_safetensors(run.out / "probes.safetensors", shapes))
    for name, probe in probes.items():
        with evaluating(run, probe):
            _, hits = field_hits(run, probe, vectors, [case.step for case in inner])
        hits = hits.cpu().numpy()
        scores[name] = {field: rate(hits[:, i]) for i, field in enumerate(run.task.FIELDS)}
        scores[name]["step"] = rate(hits.all(axis=1))
    return scores

def majority(run, size):
    """The most frequent training step of each slot, in words."""
    seen = defaultdict(Counter)
    for problem in run.task.draw(rng_of(run.cfg.seed, "majority", size), TRAIN, size, 5000):
        for slot, step in enumerate(run.task.work(problem)):
            seen[slot][run.task.say(step)] += 1
    return [seen[slot].most_common(1)[0][0] for slot in sorted(seen)]

def control_scores(run, oracle, known):
    """What is said of the step with nothing injected, with noise, with another problem's thought of
    the same slot (whose step may be the same: this is not quite 0), and by always saying the slot's
    most frequent step -> {name: scores}."""
    vectors = stack(known)
    noise = rng_of(run.cfg.seed, "noise").standard_normal(vectors.shape)
    blind = Oracle(oracle.model)  # nothing is whitened: zeros stay zeros, and inject nothing
    most = {size: majority(run, size) for size in run.cfg.digits}
    said = {"none": ask(run, blind, torch.zeros_like(vectors)),
            "random": ask(run, blind, put(noise, vectors.device)),
            "shuffled_same_slot": ask(run, oracle, stack(known, before=1)),
            "slot_majority": [most[run.task.size(test.problems[row])][slot]
                              for test, slot, row, _ in known]}
    steps = [case.step for case in known]
    return {name: step_scores(run.task, words, steps) for name, words in said.items()}

def donations(run, tests, test, slot, rng):
    """Who gives thoughts to a test's problems, in this slot (two, three: in others, too): (figure,
    donors), one by one.

    iia: the row before. iia_two, iia_three: so many slots from as many donors (more than --given
    are never trained). iia_size: donors of another size (never trained). iia_same: training
    problems whose step there is the own one, word for word (where there is none, the problem
    itself, which does not count).
    """
    task, problems, donors = run.task, test.problems, {}
    others = [other for other in rng.permutation(len(test.thoughts)).tolist() if other != slot]
    for name, added in zip(("iia", "iia_two", "iia_three"), (slot, *others)):
        donors = {**donors, added: rows_before(problems, len(donors) + 1)}
        yield name, donors
    size, final = task.size(problems[0]), task.fields(test.works[0][slot]) is None
    for other in tests:
        if task.size(other.problems[0]) != size and slot < len(other.thoughts):
            if (task.fields(other.works[0][slot]) is None) == final:
                many = other.problems * math.ceil(len(problems) / len(other.problems))
                yield "iia_size", {slot: many[:len(problems)]}
                break
    having = defaultdict(list)
    for problem in task.draw(rng, TRAIN, size, 5000):
        having[task.say(task.work(problem)[slot])].append(problem)
    same = [having[task.say(steps[slot])] or [own] for own, steps in zip(problems, test.works)]
    yield "iia_same", {slot: [each[rng.integers(len(each))] for each in same]}

def follow(run, oracle, test, slot, patched, hits, by_slot):
    """With one slot given by another problem: is the answer right, where it should be another
    (iia_changed), and where later steps are others (iia_flow)? And does the next thought say its
    step, where that is another, and not one that is never read (said_after)?"""
    task, later = run.task, patched.thoughts[slot + 1:]
    said = ask(run, oracle, later[0].reading) if later else []
    for row, right in enumerate(as_worked(run, patched)):
        steps, own = patched.works[row], test.works[row]
        if task.spell(steps) != task.spell(own):
            hits["iia_changed"].append(right)
            by_slot[slot].append(right)
        if steps[slot + 1:] != own[slot + 1:]:
            hits["iia_flow"].append(right)
            if steps[slot + 1] != own[slot + 1] and not task.never_read(steps[slot + 1]):
                hits["said_after"].append(said[row] == task.say(steps[slot + 1]))

def causal_scores(run, model, oracle, tests):
    """What answers and later thoughts do when thoughts are given -> the section "causal".

    keep: answers that stay as they were, with all thoughts the mean ones of the batch, or with all
    those of the row before. The others: donations() and follow(). by_slot: iia_changed.
    """
    rng = rng_of(run.cfg.seed, "donors")
    keep, hits, by_slot = defaultdict(list), defaultdict(list), defaultdict(list)
    for test in tests:
        mean = [thought.map(lambda x: x.mean(0, keepdim=True).expand_as(x))
                for thought in test.thoughts]
        for name, thoughts in (("mean", mean), ("swap", [t.roll() for t in test.thoughts])):
            answers = answer(run, model, test.prompt, thoughts)
            keep[name] += [now == own for now, own in zip(answers, test.answers)]
        for slot in range(len(test.thoughts) if run.exchanges else 0):
            for name, donors in donations(run, tests, test, slot, rng):
                patched = solve(run, model, test.problems, donors)
                if name != "iia_same":
                    hits[name] += as_worked(run, patched)
                else:  # nothing may change
                    rows = zip(donors[slot], test.problems, patched.answers, test.answers)
                    hits[name] += [now == was for donor, own, now, was in rows if donor != own]
                if name == "iia":
                    follow(run, oracle, test, slot, patched, hits, by_slot)
    scores = {"keep": rates_of(keep), **rates_of(hits)}
    return {**scores, "by_slot": rates_of(by_slot)} if run.exchanges else scores

def in_words(run, oracle, solved):
    """Solved problems as ask and the report show them -> a dict for each."""
    task, views = run.task, []
    said = [ask(run, oracle, thought.reading) for thought in solved.thoughts]
    for row, steps in enumerate(solved.works):
        donors = {str(slot): task.text(others[row]) for slot, others in solved.donors.items()}
        views.append({
            "problem": task.text(solved.problems[row]), "answer": solved.answers[row],
            "spelled": task.spell(steps), "steps": [task.say(step) for step in steps],
            "said": [words[row] for words in said], "donors": donors})
    return views

def examples(run, model, oracle, tests, n=20):
    """Held-out problems in words, and each with one thought given by the one before."""
    found = []
    for test in tests:
        problems = test.problems[:max(2, math.ceil(n / len(tests)))]
        views = in_words(run, oracle, solve(run, model, problems))
        if run.exchanges and test.thoughts:
            donors = {(len(test.thoughts) - 1) // 2: rows_before(problems)}
            patched = in_words(run, oracle, solve(run, model, problems, donors))
            views = [{**own, "exchanged": other} for own, other in zip(views, patched)]
        found += views
    return found

def forced(run, model, tests):
    """Answers right by teacher forcing, as other papers measure: each token after the true ones
    before it -> list of bool."""
    right = []
    for test in tests:
        batch = make_batch(run, test.problems, test.works, 0)
        with evaluating(run, model):
            hidden, _, _ = model(model.wte(batch.answer), *test.prompt.for_answer(test.thoughts))
            right += all_right(model.logits(hidden), batch.answer_target).bool().tolist()
    return right

def environment(cfg):
    """Versions and hardware, for results.json."""
    gpu = cfg.device == "cuda"
    device = torch.cuda.get_device_name() if gpu else f"cpu, {torch.get_num_threads()} threads"
    # a shell, so that a missing git is no exception
    git = subprocess.run("git describe --always --dirty", shell=True, cwd=Path(__file__).parent,
                         capture_output=True, text=True, check=False).stdout.strip()
    return {"torch": torch.__version__, "device": device, "git": git}

def evaluate(run):
    """Everything that is measured on held-out problems -> results.json."""
    coconut, kind = load_model(run, "coconut"), run.cfg.kind
    # a Solved for each batch of one size; everything below is measured on these
    tests = [solve(run, coconut, problems) for problems in held_out(run, 500)]
    scores = stage_scores(run, coconut)  # once the model is warm, for its seconds
    text, oracle = stage_scores(run, coconut, "0"), None
    sections = {
        "cost": {name: {"tokens": found["tokens"], "seconds": found["seconds"]}
                 for name, found in (("text", text), ("thoughts", scores))},
        "config": run.cfg.knobs, "env": environment(run.cfg)}
    if kind.latent:
        oracle = self_oracle(run, coconut)
        white = oracle.white or whitener_of(run, coconut)
        lora = Oracle(load_model(run, "lora"), white)
        known, never = cases_of(run.task, tests)
        asked = run.text.of_thoughts if kind.explain else run.text.families
        sections["oracle"] = oracle_scores(run, oracle, known, never, asked)
        if not kind.explain:
            sections["oracle"]["skill_after"] = stage_scores(run, oracle.model)
        sections["lora"] = oracle_scores(run, lora, known, never, run.text.families)
        sections["controls"] = control_scores(run, oracle, known)
        sections["causal"] = causal_scores(run, coconut, oracle, tests)
        if run.task.FIELDS:
            sections["probes"] = probe_scores(run, white, known)
    sections["examples"] = examples(run, coconut, oracle, tests)
    record(run, "coconut", "stages", "all", **scores)
    record(run, "coconut", by_digits=scores["by_digits"], text_after=text,
           teacher_forced=rate(forced(run, coconut, tests)))
    record(run, **sections)

# --------------------------------------------------------------------------------------------------
# 12. Printing and report.html

def headline(results):
    """The result in a few sentences, with its controls and its decisive caveat."""
    best, kind = results["coconut"]["stages"]["all"], KINDS[results["config"]["thoughts"]]
    split, causal = results["config"]["split"], results.get("causal", {})
    told = f"{best['exact']:.1%} of {best['n']} {split} problems are answered right."
    if kind.latent:
        step, controls = results["oracle"]["step"], results["controls"]
        reader = "the model itself" if kind.explain else "the oracle"
        told += (f" Of one thought, {reader} says {step['exact_no_final']:.1%} of "
                 f"{step['n_no_final']} steps word for word (given another problem's thought of "
                 f"the same slot {controls['shuffled_same_slot']['exact_no_final']:.1%}, given "
                 f"none {controls['none']['exact_no_final']:.1%}). With the mean thought in place "
                 f"of all, {causal['keep']['mean']['exact']:.1%} of the answers stay.")
    if "iia_changed" in causal:
        changed = causal["iia_changed"]
        told += (" With one thought given by another problem, the answer is what the sum worked so "
                 f"spells in {changed['exact']:.1%} of the {changed['n']} cases that this changes.")
    return told

def figures(section, name=""):
    """Every rate in a section of results.json -> [(name, rate), ...]."""
    found = [(name, section)] if "exact" in section else []
    if "exact_no_final" in section:
        without = wilson(section["exact_no_final"], section["n_no_final"])
        found.append((f"{name}, no final slot", without))
    for key, inner in section.items():
        if isinstance(inner, dict) and not ("exact" in section and key == "by_digits"):
            found += figures(inner, f"{name}, {key}" if name else key)
    return found

SECTIONS = {"coconut": "answers to held-out problems", "oracle": "the oracle reads",
            "lora": "a LoRA oracle reads", "controls": "controls of the oracle",
            "probes": "probes find",
            "causal": "thoughts given: answers as worked so (keep, iia_same: as before)"}

def tables(results):
    """results.json as text: all of its rates, and the costs."""
    lines = []
    for section, title in SECTIONS.items():
        if section in results:
            lines += ["", title]
            lines += [f"  {name:<40}{show_rate(r)}" for name, r in figures(results[section])]
    lines += ["", "a problem: positions before the answer, time up to its end"]
    for name, cost in results["cost"].items():
        lines.append(f"  {name:<40}{cost['tokens']:.1f} positions, {1000 * cost['seconds']:.2f} ms")
    return "\n".join(lines)

STYLE = """:root { color-scheme: light dark }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: auto; padding: 1rem }
h1 + p { font-size: 1.15rem } pre { font: .85rem/1.4 ui-monospace, monospace }
section { display: flex; flex-wrap: wrap; gap: 0 2rem }
figure { display: inline-block; margin: 0 1.5rem 1rem 0; width: 12rem; font-size: .75rem }
svg { overflow: visible; fill: none }"""

def as_text(view):
    """A problem of in_words(), thought by thought beside the hand-worked one -> lines."""
    wrong = "" if view["answer"] == view["spelled"] else f"   ! by hand {view['spelled']}"
    lines = [f"{view['problem']}{view['answer']}{wrong}",
             f"slot  {'worked by hand':<26}the thought says"]
    for slot, (step, said) in enumerate(zip(view["steps"], view["said"])):
        donor = view["donors"].get(str(slot))
        note = f"   <- of {donor}" if donor else ""
        lines.append(f"{slot:<6}{step:<24}  {said}{'   !' * (step != said)}{note}")
    return lines

def html_example(view):
    """A problem, and beside it the same with one thought given, what this changes marked."""
    own, parts = as_text(view), ["<section>"]
    for shown in filter(None, (view, view.get("exchanged"))):
        parts.append("<pre>")
        for line, before in zip(as_text(shown), own):
            escaped = html.escape(line)
            parts.append(f"{escaped}\n" if line == before else f"<mark>{escaped}</mark>\n")
        parts.append("</pre>")
    return "".join(parts) + "</section>"

def steps_changed(view):
    """How many steps of a problem, worked by hand, the given thought changes."""
    pairs = zip(view["steps"], view.get("exchanged", view)["steps"])
    return sum(own != now for own, now in pairs)

def html_curve(phase, entries):
    """Share right of a phase's training batches, by step."""
    points = [f"{100 * entry['step'] / entry['steps']:.0f},{50 - 50 * entry['exact']:.1f}"
              for entry in entries]
    return ("<figure><svg viewBox='0 0 100 50'><path d='M0 0V50H100' stroke='gray'/>"
            f"<polyline points='{' '.join(points)}' stroke='currentColor'/></svg>"
            f"{phase}: right {entries[-1]['exact']:.3f}, loss {entries[-1]['loss']:.3f}</figure>")

def page(run, results):
    """report.html: one file that needs no other."""
    path, phases = run.out / "log.jsonl", defaultdict(dict)
    with one_line(path, "delete it"):
        for entry in map(json.loads, path.read_text().splitlines() if path.exists() else []):
            phases[entry["phase"]][entry["step"]] = entry  # the later one, after --resume
    # first the one that shows most, chosen by hand-worked steps, not by what the model made of it
    views = sorted(results["examples"], key=steps_changed, reverse=True)
    first, *others = [html_example(view) for view in views]
    curves = [html_curve(phase, list(entries.values())) for phase, entries in phases.items()]
    about = json.dumps({**results["config"], **results["env"]})
    return "\n".join([
        "<!doctype html><html lang=en><meta charset=utf-8><title>cocoracle</title>",
        f"<style>{STYLE}</style><h1>cocoracle</h1><p>{html.escape(headline(results))}</p>",
        first, f"<pre>{html.escape(tables(results))}</pre>", *curves, *others,
        f"<h2>The run</h2><p>{html.escape(about)}</p></html>\n"])

# --------------------------------------------------------------------------------------------------
# 13. Ask: type a problem and watch it think

HELP = """347+285                        work a problem in thoughts, and say them
? 1 QUESTION                   ask the thought of slot 1 something in your own words
swap 1 158+667                 give it the thought that 158+667 has in slot 1
set 1 4+8=12 write 2 carry 1   give it a thought that says this, of a problem found to have it"""

def problem_of(run, line):
    """The problem that was typed. Raises UserError."""
    sizes = ", ".join(map(str, run.cfg.digits))
    with one_line(repr(line[:40]), f"this model knows problems of size {sizes}"):
        problem = run.task.typed(line)  # somebody's code raises anything
        if problem is None or run.task.size(problem) not in run.cfg.digits:
            raise ValueError("no command, and no such problem")
    return problem

def respond(run, model, oracle, line, problem, donors):
    """Do what a line asks for, about the current problem, some of whose thoughts donors give
    -> these two from then on."""
    task, command = run.task, re.fullmatch(r"(\?|swap|set) *(\d{1,3}) +(.+)", line)
    if not command:
        problem, donors = problem_of(run, line), {}
    else:
        verb, slot, words = command[1], int(command[2]), command[3]
        if problem is None or slot >= len(task.work(problem)):
            raise UserError(f"{line[:40]!r}: type a problem first, one that has such a slot")
        if verb == "?":
            thoughts = solve(run, model, [problem], donors).thoughts
            print(*ask(run, oracle, thoughts[slot].reading, words), flush=True)
            return problem, donors
        size = task.size(problem)
        if verb == "swap":
            found = [problem_of(run, words)]
        else:  # one found to have the step
            drawn = task.draw(rng_of(run.cfg.seed, "set"), TRAIN, size, 20000)
            found = [other for other in drawn if task.say(task.work(other)[slot]) == words]
        if not run.exchanges or not found or task.size(found[0]) != size:
            raise UserError(f"{words[:40]!r} cannot be given in slot {slot}: it must be of a "
                            "problem of that size, and of a task whose work() takes given steps")
        donors = {slot: found[:1]}
    (view,) = in_words(run, oracle, solve(run, model, [problem], donors))
    print(*as_text(view), sep="\n", flush=True)
    return problem, donors

def ask_loop(run):
    """--stage ask: lines typed, or of a file. After a file, an error if one was not understood."""
    model, errors, typing = load_model(run, "coconut"), 0, sys.stdin.isatty()
    oracle, current = self_oracle(run, model), (None, {})
    if hasattr(sys.stdin, "reconfigure"):  # what is no UTF-8 is not understood, and that is all
        sys.stdin.reconfigure(errors="replace")
    if typing:
        import readline  # noqa: F401  gives input() a history
        print(HELP)
    while True:
        try:
            line = input("> " if typing else "").strip()
            current = respond(run, model, oracle, line, *current) if line else current
        except EOFError:
            break
        except UserError as e:
            errors += 1
            print(f"error: {e}", file=sys.stderr, flush=True)
    if errors and not typing:
        raise UserError(f"{errors} lines were not understood: see above")

# --------------------------------------------------------------------------------------------------
# 14. Command line

PARTS = {  # name: what does it, and the file whose presence says that it is done
    "coconut": (train_coconut, "coconut/model.safetensors"),
    "probes": (train_probes, "probes.safetensors"),
    "oracle": (train_oracle, "oracle/model.safetensors"),
    "lora": (lambda run: train_oracle(run, "lora"), "lora/adapter_model.safetensors"),
    "eval": (evaluate, "report.html")}

class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message}: see --help")

def numbers(string):
    """`2-4`, `2,3` or, as config.json has it, `[2, 3]` -> numbers from 1 to 99, in order."""
    lowest, dash, highest = string.strip("[]").partition("-")
    found = range(int(lowest), int(highest) + 1)[:100] if dash else map(int, lowest.split(","))
    found = tuple(sorted(set(found)))
    if not found or found[0] < 1 or found[-1] > 99:
        raise ValueError
    return found

def dashed(name):
    return "--" + name.replace("_", "-")

def parse(argv):
    """Command line -> Config. A later part, and --resume, take what is unset from the run in --out,
    and must not contradict it. Raises UserError."""
    parser = Parser(prog="cocoracle.py", description=__doc__, allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter,
                    argument_default=argparse.SUPPRESS)
    for field in dataclasses.fields(Config):
        how = {"action": argparse.BooleanOptionalAction}
        if field.type is not bool:
            kind = numbers if field.type is tuple else field.type
            how = {"type": kind, "choices": field.metadata["choices"]}
        parser.add_argument(dashed(field.name), help=field.metadata["help"], **how)
    flags = vars(parser.parse_args(argv))
    out = flags.get("out") or f"runs/{flags.get('model', 'tiny')}"
    stage = flags.get("stage", "all")
    new = stage in ("all", "coconut") and not flags.get("resume")
    saved = {} if new else load_json(Path(out) / "config.json")
    told = [f"{dashed(name)}={value}" for name, value in saved.items()]
    with one_line(f"{out}/config.json", "choose another --out"):
        saved = vars(parser.parse_args(told))
    for name, value in saved.items():
        free = {"weights", "dtype"} | ({"eval_problems", "split"} if stage == "eval" else set())
        if name not in free and flags.get(name, value) != value:
            raise UserError(f"{dashed(name)} {flags[name]}: the run in {out} has {value}: leave it "
                            "out, or choose another --out")
    settings = {**saved, **flags, "out": out}
    cfg = Config(**settings)
    # updates in stages with thoughts go with 1 / sqrt(width)
    fewer = math.sqrt(SIZES["tiny"].width / cfg.size.width)
    steps = {name: round(fewer * getattr(cfg, name)) for name in ("train_mixed", "train_latent")}
    cfg = Config(**{**steps, **settings})
    for field in dataclasses.fields(Config):
        value, low, high = getattr(cfg, field.name), field.metadata["low"], field.metadata["high"]
        if field.type in (int, float) and not low <= value <= high:
            raise UserError(f"{dashed(field.name)} takes {low} to {high}, not {value}")
    gpu = cfg.device == "cuda" or cfg.device == "auto" and torch.cuda.is_available()
    dtype = cfg.dtype if cfg.dtype != "auto" else "bfloat16" if gpu else "float32"
    # one problem at a time, as in ask, would be compiled anew, and is as fast without
    compiled = (gpu if cfg.compile is None else cfg.compile) and cfg.stage != "ask"
    return dataclasses.replace(cfg, device="cuda" if gpu else "cpu", dtype=dtype, compile=compiled)

def parts_of(cfg):
    """The parts of a whole run, in order."""
    if not cfg.kind.latent:
        return ["coconut", "eval"]
    readers = ["lora"] if cfg.kind.explain else ["oracle", "lora"]
    return ["coconut", "probes", *readers, "eval"]

def check(cfg):
    """Refuse what cannot work before anything is written. Raises UserError."""
    out, stage, parts = Path(cfg.out), cfg.stage, parts_of(cfg)
    done = [part for part, (_, name) in PARTS.items() if (out / name).exists()]
    started = (out / "config.json").exists()
    begins = stage in ("all", "coconut")
    again = (started or done) if begins else (stage in done and stage != "eval")
    needed = {"all": [], "coconut": [], "eval": parts[:-1], "ask": {"coconut", "oracle"} & {*parts}}
    missing = [part for part in needed.get(stage, ["coconut"]) if part not in done]
    for refused, why in (
        (cfg.weights and not cfg.pretrained,
         "--weights is for --model gpt2 or a larger one, and not for --init scratch"),
        (cfg.device == "cuda" and not torch.cuda.is_available(),
         "--device cuda: torch finds no GPU: use --device cpu"),
        (cfg.resume and not started,
         f"--resume: there is no run in {out}: leave --resume out to start one"),
        (stage not in ("all", *parts) and (stage != "ask" or not cfg.kind.latent),
         f"--stage {stage}: not for --thoughts {cfg.thoughts}, see KINDS"),
        (again and not cfg.resume,
         f"{out} already has that: --resume goes on with a run, another --out keeps both"),
        (missing, f"--stage {stage} needs {', '.join(missing)} in {out}: run --stage all first")):
        if refused:
            raise UserError(why)

def load_task(cfg):
    """The task: sums, or the class Task of --task FILE.py. Raises UserError."""
    if not cfg.task:
        return Sums(cfg.digits)
    sys.modules.setdefault("cocoracle", sys.modules[__name__])  # a task may import this file
    with task_code(f"--task {cfg.task}"):
        found = runpy.run_path(cfg.task)
        assert "Task" in found, "there is no class Task, see Sums"
        task = type("Task", (found["Task"], Defaults), {})(cfg.digits)
        taken = {*task.FIELDS} & {*NOUNS, "never_read", "skill_after"}
        assert not taken, "FIELDS has a name that the program uses"
        return task

def open_run(cfg):
    """The run's task and vocabulary -> Run. Nothing is written. Raises UserError."""
    torch.set_float32_matmul_precision("high")
    task, ranks = load_task(cfg), None
    if cfg.pretrained:
        ranks = gpt2_weights.read_bpe(released(cfg, gpt2_weights.BPE_FILES))
    return try_out(Run(cfg, task, Text(task, ranks), Path(cfg.out)))

def main(argv=None):
    cfg = parse(argv)
    check(cfg)
    run = open_run(cfg)
    parameters = sum(math.prod(shape) for shape in shapes_of(run).values())
    print(f"cocoracle {cfg.stage} | {cfg.thoughts} | {cfg.model}, {parameters:,} parameters | "
          f"{environment(cfg)['device']}, {cfg.dtype} | {cfg.task or 'sums'} of "
          f"{', '.join(map(str, cfg.digits))} | seed {cfg.seed} | {cfg.out}", flush=True)
    if cfg.stage == "ask":
        return ask_loop(run)
    for part in parts_of(cfg) if cfg.stage == "all" else [cfg.stage]:
        work, name = PARTS[part]
        if part == "eval" or not (run.out / name).exists():
            state = load_last(run)
            before = state["seconds"] if state.get("phase", "").startswith(part) else 0.0
            run = run._replace(start=time.time() - before)
            work(run)
            seconds = record(run, "seconds", **{part: time.time() - run.start})["seconds"]
            total = sum(seconds[name] for name in PARTS if name in seconds)
            results = record(run, "seconds", total=total)
    if part == "eval":
        write_atomic(run.out / "report.html", page(run, results))
        print(f"{tables(results)}\n\n{headline(results)}\n{results['seconds']['total']:.0f} s in "
              f"all on {results['env']['device']}: see {run.out / 'report.html'}")

def load(out, device="auto"):
    """A finished run, for notebooks -> Run, its model, and the Oracle that reads its thoughts."""
    cfg = parse(["--stage", "ask", "--out", str(out), "--device", device])
    check(cfg)
    run = open_run(cfg)
    coconut = load_model(run, "coconut")
    return run, coconut, self_oracle(run, coconut)

def command_line(argv=None):
    """main(), with mistakes and interruptions told in one line -> the exit code."""
    try:
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        main(argv)
        return 0
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
    except (MemoryError, torch.OutOfMemoryError):
        print("error: out of memory: choose another --out with a smaller --batch-size and more "
              "--accumulate, or a smaller --model", file=sys.stderr)
    except BrokenPipeError:  # nobody reads on
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as e:
        print(f"error: {e.filename or 'a file'} cannot be read or written ({e.strerror}): what "
              "was there before is whole; make room, or choose another --out", file=sys.stderr)
    except KeyboardInterrupt:
        print("\ninterrupted: --resume goes on from the last checkpoint", file=sys.stderr)
        return 130
    return 2

if __name__ == "__main__":
    sys.exit(command_line())
