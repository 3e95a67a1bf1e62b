# /// script
# requires-python = ">=3.11"
# dependencies = ["torch>=2.9", "tiktoken", "numpy"]
# ///
"""cocoracle: can we read what a language model is thinking while it reasons in latent space?

A GPT-2 learns to add with a written, carry-by-carry chain of thought; a curriculum then replaces the written steps by
*continuous thoughts* (Coconut); and an *activation oracle* learns to read a thought's hidden state and to say in words
which step it stands for. Baselines and controls stand beside every figure.

    python cocoracle.py                                   # tiny model, from scratch, CPU, minutes
    python cocoracle.py --bottleneck --labels all         # thoughts that matter, and an oracle that reads what they do
    python cocoracle.py --stage ask --out runs/tiny       # type 347+285 and watch it think

Sections: 1 this text; 2 configuration; 3 arithmetic and text; 4 GPT-2; 5 thinking; 6 injection and LoRA; 7 training
kit; 8 Coconut curriculum; 9 oracles; 10 probes; 11 evaluation; 12 stages and command line.

Papers: Coconut (arXiv:2412.06769), Activation Oracles (arXiv:2512.15674), LoRA (arXiv:2106.09685), probes (1610.01644).

Symbols: B batch, T positions of this call, S positions in the cache, C width, V vocabulary, L layers, H heads,
D digits of an operand, K thoughts, N readings, R layers read, A vectors injected.
  step      one line of text chain of thought, `7+5=12 write 2 carry 1`
  slot      index of a step in its problem; D digits make D+1 slots, always (the last holds the final carry)
  thought   one latent position: its input is the last hidden state (after ln_f) of the position before
  stage k   the last k slots are thoughts, those before are text; 0 is all text, "all" is all thoughts
  layer l   the residual stream after l blocks; 0 is what enters the first block
  reading   the residual stream of one thought at the layers read

It does not: sample (every answer is greedy), batch sums of different lengths, or train on anything but problems that
are solved in steps (sums, or a file of your own: --data).
"""

import argparse
import dataclasses
import html
import itertools
import json
import math
import os
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
import zipfile
import zlib
from collections import Counter, defaultdict
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tiktoken
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import gpt2_weights
from gpt2_weights import WeightsError, read_bpe, read_pickle, read_safetensors, write_safetensors

# -----------------------------------------------------------------------------------------------------------
# 2. Configuration
STAGES = ("all", "coconut", "probes", "oracle", "lora", "eval", "ask", "bench", "export")
SIZES = {"tiny": (3, 3, 96), **gpt2_weights.SIZES}  # name: (layers, heads, width)

def opt(default, help, **more):
    """One configuration field: its default and, as metadata, what argparse needs."""
    return dataclasses.field(default=default, metadata={"help": help, **more})

def digits_arg(s):
    """'2,3' or '2-4' -> (2, 3) or (2, 3, 4): operands of 2 to 8 digits."""
    ends = [int(d) for d in re.findall(r"\d", s)]
    if not re.fullmatch(r"[2-8](-[2-8]|(,[2-8])*)", s) or "-" in s and ends[0] > ends[1]:
        raise argparse.ArgumentTypeError(f"takes lengths from 2 to 8 as `2,3` or `2-4`, not {s!r}")
    return tuple(range(ends[0], ends[1] + 1)) if "-" in s else tuple(sorted(set(ends)))

def shares_arg(s):
    """'0,0.5' -> (0.0, 0.5)."""
    return tuple(number(float, 0, 1)(x) for x in s.split(",")) if s else ()

def number(kind, low, high=math.inf):
    """-> the argparse type of a finite int or float in [low, high]."""
    def convert(s):
        try:
            value = kind(s)
        except ValueError:
            value = math.nan
        if not low <= value <= high or value == math.inf:
            limits = f"at least {low}" if high == math.inf else f"from {low} to {high}"
            raise argparse.ArgumentTypeError(f"takes {'an integer' if kind is int else 'a number'} {limits}, not {s!r}")
        return value
    return convert

COUNT, SHARE, RATE, AT_LEAST_0 = number(int, 1), number(float, 0, 1), number(float, 1e-12), number(float, 0)

def recipe(default, help):
    """A field (training steps, AdamW's rate, Muon's rate, weight decay), of which the first ones may be given."""
    def convert(s):
        kinds = (COUNT, RATE, AT_LEAST_0, AT_LEAST_0)
        given = s.split(",")
        if len(given) > len(kinds):
            raise argparse.ArgumentTypeError(f"takes at most STEPS,LR,MUON,DECAY, not {s!r}")
        return tuple(kind(x) for kind, x in zip(kinds, given))
    return opt(default, "training of " + help, type=convert)

@dataclasses.dataclass(frozen=True)
class Config:
    """Every knob, with its help line; the command line is made from it. Defaults are tiny's, on a CPU."""
    stage: str = opt("all", "what to run; `all` runs coconut, probes, oracle, lora, eval in order", choices=STAGES)
    model: str = opt("tiny", "size of the GPT-2", choices=tuple(SIZES))
    init: str = opt("auto", "where weights start; auto: scratch for tiny, else the released GPT-2's",
                    choices=("auto", "pretrained", "scratch"))
    weights: str = opt("", "directory with GPT-2's released files (default: fetched once, then cached)")
    out: str = opt("", "directory of the run (default runs/MODEL)")
    resume: bool = opt(False, "go on with the run in --out: finished parts are kept")
    force: bool = opt(False, "train again over a finished part in --out")
    seed: int = opt(0, "seed of weights and data", type=number(int, 0, 2**63 - 1))
    device: str = opt("auto", "where to run; auto takes the GPU if there is one", choices=("auto", "cpu", "cuda"))
    dtype: str = opt("auto", "auto: bfloat16 on a GPU, else float32", choices=("auto", "float32", "bfloat16"))
    compile: bool = opt(None, "torch.compile the blocks (default: on a GPU)")
    # data
    data: str = opt("", "a file of problems of your own in place of sums, as Coconut has them: a JSON list of "
                    '{"question", "steps", "answer"}')
    data_crc: int = opt(0, "checksum of that file; filled in, to tell when it has changed", type=int)
    digits: tuple = opt((2, 3), "operand lengths, as `2,3` or `2-4`", type=digits_arg)
    thoughts_per_slot: int = opt(1, "thoughts in place of one text step", type=COUNT)
    thoughts: str = opt("hidden", "what a thought is fed: the last hidden state, or one learned vector (a control)",
                        choices=("hidden", "pause"))
    bottleneck: bool = opt(False, "in the last stage the answer sees the thoughts alone, not the problem")
    protocol: str = opt("own", "seed: texts, layers and questions of syvb/cocoracle, to measure its published "
                        "checkpoints with --stage eval --coconut FILE --oracle FILE", choices=("own", "seed"))
    coconut: str = opt("", "the seed's checkpoint of the Coconut model (.pt)")
    oracle: str = opt("", "the seed's checkpoint of the self-oracle (.pt)")
    # coconut
    batch_size: int = opt(64, "problems (or readings) in a training step", type=COUNT)
    micro_batch: int = opt(0, "how many of them at a time in a process (default: what memory holds, found by halving)",
                           type=number(int, 0))
    train_text: tuple = recipe((250, 3e-3, 0.02, 0.01), "stage 0, all text: STEPS,LR,MUON,DECAY, or the first of them: "
                               "AdamW's peak learning rate, Muon's on the matrices (0: none), weight decay of both")
    train_mixed: tuple = recipe((80, 3e-3, 0.02, 0.01), "stage 1; stage k takes k times the steps")
    train_latent: tuple = recipe((350, 3e-3, 0.01, 0.3), "the last stage once more, or the bottleneck")
    explain: float = opt(0.0, "weight of the oracle's loss on the live thoughts, while these are trained",
                         type=AT_LEAST_0)
    # oracles
    labels: str = opt("gold", "what oracles learn to say: the text step, what the model itself will write, or both",
                      choices=("gold", "model", "all"))
    families: str = opt("all", "how many families of questions about the step they learn", choices=("1", "3", "all"))
    read_layers: tuple = opt((0.5,), "layers read, as shares of the depth (rounded up), as `0,0.5`", type=shares_arg)
    inject_layers: tuple = opt((), "layers that a reading is added to (default: the one before the highest read)",
                               type=shares_arg)
    whiten: bool = opt(True, "whiten readings before use")
    scale: float = opt(2.0, "strength of a reading, relative to the state it is added to", type=AT_LEAST_0)
    train_oracle: tuple = recipe((2300, 3e-3, 0.02, 0.01), "the self-oracle, for each kind of labels")
    rehearsal: float = opt(0.25, "share of its steps that repeat the coconut's own task too", type=SHARE)
    train_lora: tuple = recipe((450, 3e-3, 0.02, 0.01), "the LoRA oracle, for each kind of labels")
    lora_rank: int = opt(32, "rank of its adapters", type=COUNT)
    # evaluation
    probe_problems: int = opt(20000, "training problems of each length for the probes", type=COUNT)
    train_probes: tuple = recipe((1000, 5e-3, 0.0, 0.01), "each probe, on batches of 512 readings")
    eval_problems: int = opt(1000, "held-out problems in an evaluation, split evenly over --digits", type=COUNT)
    prior: str = opt("", "directory of another run, whose readings the oracle is asked about as a control")
    json: bool = opt(False, "--stage ask answers with a JSON object a line")
    log_every: int = opt(100, "training steps between log lines", type=COUNT)
    save_every: float = opt(60.0, "seconds between checkpoints", type=AT_LEAST_0)

    @property
    def positions(self):
        return 256 if self.model == "tiny" else 1024

    @property
    def pretrained(self):
        return self.init == "pretrained" or self.init == "auto" and self.model != "tiny"

    def depths(self, shares):
        return tuple(sorted({math.ceil(x * SIZES[self.model][0]) for x in shares}))

    @property
    def layers(self):
        """The layers read, lowest first. The seed's "Layer 18" is the output of block 18, counted from 0: layer 19."""
        return (19,) if self.protocol == "seed" else self.depths(self.read_layers)

    @property
    def views(self):
        """What is shown of a reading, by name: each layer read alone and, with several, all -> their indices."""
        one = {str(layer): [i] for i, layer in enumerate(self.layers)}
        return one if len(one) == 1 else one | {"all": list(range(len(one)))}

    @property
    def into_layers(self):
        """Where readings are added: by default, as in the seed, one layer before the highest one read (or at 0)."""
        return self.depths(self.inject_layers) if self.inject_layers else (max(max(self.layers) - 1, 0),)

    @property
    def kinds(self):
        """The kinds of labels that oracles learn, in turn; each gets the steps of the recipe."""
        return ("gold", "model") if self.labels == "all" else (self.labels,)

    @property
    def curriculum(self):
        """Stages in order, by name: how many of the last slots are thoughts. "all" is the last of them once more, or
        the bottleneck, with a recipe of its own."""
        most = max(self.digits) + 1
        return {str(k): k for k in (0, 1, 2, 3, most) if k <= most} | {"all": self.last}

    @property
    def last(self):
        """The number of the last stage: all slots are thoughts, and one more for the bottleneck."""
        return max(self.digits) + 1 + self.bottleneck

# What differs where weights are large or pretrained: from the field (Coconut: lr 1e-4, batch 128), untried by us.
LARGE = {"batch_size": 128, "train_text": (2000, 1e-4, 0.0, 0.01), "train_mixed": (500, 1e-4, 0.0, 0.01),
         "train_latent": (3000, 1e-4, 0.0, 0.01), "train_oracle": (6000, 1e-4, 0.0, 0.01),
         "train_lora": (6000, 1e-4, 0.0, 0.01)}
# The seed's published checkpoints: of GPT-2-large, on sums of 2 to 4 digits, readings as they are.
SEED = {"model": "gpt2-large", "digits": (2, 3, 4), "whiten": False}
# What a later part may set for itself; everything else is as it was when the run's coconut was trained.
OWN = {"probes": ("probe_problems", "train_probes"), "oracle": ("train_oracle", "rehearsal", "labels", "families"),
       "lora": ("train_lora", "lora_rank")}
ANYTIME = ("eval_problems", "prior", "log_every", "save_every", "weights", "micro_batch", "data")
SESSION = ("stage", "out", "resume", "force", "device", "dtype", "compile", "json")  # not a property of the run

def knobs(cfg):
    """The properties of a run: what config.json holds."""
    skip = (*SESSION, "digits") if cfg.data else (*SESSION, "data_crc")
    return {name: value for name, value in dataclasses.asdict(cfg).items() if name not in skip}

class UserError(Exception):
    """A user's mistake: its text, one line with the remedy, is all that is printed; the exit code is 2."""

class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message}: see --help")

def parse(argv):
    """Command line -> Config. A new run takes unset fields from its recipe; a later part or --resume takes them from
    --out's config.json, and must not contradict it. Raises UserError."""
    parser = Parser(prog="cocoracle.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                    argument_default=argparse.SUPPRESS, allow_abbrev=False)
    for field in dataclasses.fields(Config):
        extra = {"action": argparse.BooleanOptionalAction} if field.type is bool else {}
        note = "" if field.default in (None, "", (), False) else f" (default {field.default})"
        extra["help"] = field.metadata["help"] + note
        parser.add_argument("--" + field.name.replace("_", "-"), **field.metadata | extra)
    given = vars(parser.parse_args(argv))
    seed = given.get("protocol") == "seed"
    stage = given.get("stage", "all")
    out = given.get("out") or f"runs/{'seed' if seed else given.get('model', 'tiny')}"
    saved = {}
    if seed:
        base = dict(SEED)
    elif stage in ("all", "coconut", "bench") and not given.get("resume"):
        base = dict(LARGE) if given.get("model", "tiny") != "tiny" else {}
    else:  # through the parser: the file may be damaged
        try:
            base = saved = vars(parser.parse_args(list(flags(load_json(Path(out) / "config.json")))))
        except UserError as e:
            raise UserError(f"{out}/config.json: {e}; restore it, or choose another --out") from None
    whole = {name: value for name, value in vars(Config).items() if name.startswith("train_")}
    for values in (base, given):  # recipes of which only the first fields are given
        values |= {name: values[name] + whole[name][len(values[name]):] for name in whole.keys() & values.keys()}
        whole |= {name: values[name] for name in whole.keys() & values.keys()}
    free = (*ANYTIME, *SESSION, *(() if given.get("resume") else OWN.get(stage, ())))
    for name in given.keys() & saved.keys() - set(free):
        if given[name] != saved[name]:
            raise UserError(f"--{name.replace('_', '-')} {given[name]}: the run in {out} has {saved[name]}: "
                            "leave it out, or choose another --out")
    cfg = Config(**{**base, **given, "out": out})
    if not cfg.data:
        return cfg
    if "digits" in given or cfg.labels != "gold" or seed:
        raise UserError("--data takes neither --digits, nor --labels model or all, nor --protocol seed: leave them out")
    problems = read_problems(cfg.data)
    if saved and saved.get("data_crc") != problems.crc:
        raise UserError(f"--data {cfg.data} is not the file that the run in {out} began with: restore it, or choose "
                        "another --out")
    return dataclasses.replace(cfg, digits=problems.lengths, data_crc=problems.crc)

def flags(saved):
    """The content of a config.json -> the command line that says the same."""
    for name, value in saved.items():
        flag = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            yield flag if value else "--no-" + flag[2:]
        else:
            yield from (flag, ",".join(map(str, value)) if isinstance(value, list) else str(value))

def changed_flags(cfg):
    """The flags of a run that are not at their defaults."""
    usual = dataclasses.asdict(Config(**LARGE if cfg.model != "tiny" else {}))
    return flags({name: list(value) if isinstance(value, tuple) else value for name, value in knobs(cfg).items()
                  if value != usual[name] and name != "data_crc"})

def load_json(path):
    """The object in a JSON file; {} where there is no file. Raises UserError on a damaged one."""
    try:
        return {**json.loads(path.read_text())}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, RecursionError) as e:
        raise UserError(f"cannot read {path} ({e}): restore it, or choose another --out") from None

# -----------------------------------------------------------------------------------------------------------
# 3. Arithmetic and text
# thoughts begin, step ends, thoughts end, a reading goes here; and the GPT-2 token whose embedding each starts from
SPECIAL = {"<bot>": ":", "<sep>": ".", "<eot>": " answer", "<act>": " thought"}
RESERVED = ("<|endoftext|>", *SPECIAL)
IGNORE = -100  # a target that is not trained on

def phrasings(openers, nouns, places):
    """Every way to ask for one of the nouns in one of the places; an opener has {} where these go."""
    return [opener.format(noun + place) for opener in openers for noun in nouns for place in places]

WHAT, THERE = ("What is {}?", "Which is {}?", "Write {}."), ("Is there {}?", "Say if there is {}.")
NO_YES = ("no", "yes")
# Families of questions about one thought, answered from the text step that it stands for.
QUESTIONS = {
    "step": phrasings(WHAT, ("the intermediate calculation", "the calculation", "this calculation"),
                      (" at this reasoning step", " at this step", " of this step", "")),
    "answer": phrasings(WHAT, ("the final answer", "the answer", "the final result", "the result"),
                        (" to this problem", " of this problem", "")),
    "problem": phrasings(WHAT, ("the problem", "this problem"),
                         (" being solved", " at this step", " of this step", "")),
    "carry_in": phrasings(THERE, ("a carry", "any carry"), (" into this column", " from the column before")),
    "carry_out": phrasings(THERE, ("a carry", "any carry"), (" out of this column", " into the next column")),
    "digit": phrasings(WHAT, ("the digit", "the written digit"), (" at this step", " of this step", " in this column")),
    "column": phrasings(WHAT, ("the column", "the number of the column"), (" at this step", " of this step", "")),
    "longer": phrasings(("Is the answer {}?", "Is the result {}?", "Is the sum {}?"), ("longer", "one digit longer"),
                        (" than the operands", " than the numbers")),
}
# Families of questions about what the model itself goes on to do, asked of all its thoughts at once; # is a column.
MODEL_QUESTIONS = {
    "written": phrasings(("Which digit {}?", "Write the digit that {}."), ("will be", "is"),
                         (" written in column #", " in column # of the answer")),
    "carried": phrasings(("Does the answer have {}?", "Does the sum have {}?"), ("a carry", "any carry"),
                         (" into column #", " coming into column #")),
}
OF_PROBLEM = ("answer", "problem", "longer")  # asked of the last thought, as the seed does
ASKED = QUESTIONS | MODEL_QUESTIONS
HELD_OUT = {family: phrased[len(phrased) // 2] for family, phrased in ASKED.items()}  # kept for evaluation
TRAINED = {family: [q for q in phrased if q != HELD_OUT[family]] for family, phrased in ASKED.items()}
SEED_QUESTIONS = {"step": "What is the intermediate calculation at this reasoning step?",
                  "answer": "What is the final answer?", "problem": "What problem is being solved?"}

def columns(a, b):
    """Add a + b by hand: one (digit of a, digit of b, carry in, digit written, carry out) per column, lowest first; the
    last holds the final carry alone."""
    out, carry = [], 0
    for da, db in zip(reversed(str(a)), reversed(str(b))):
        total = int(da) + int(db) + carry
        out.append((int(da), int(db), carry, total % 10, total // 10))
        carry = out[-1][-1]
    return [*out, (0, 0, carry, carry, 0)]

def column_text(da, db, carry_in, digit, carry_out):
    return (f"{da}+{db}" + "+1" * carry_in + f"={da + db + carry_in} write {digit}" + " carry 1" * carry_out)

def steps_of(a, b):
    """The D+1 steps of a + b as text; the last slot is the final carry, there or not."""
    *cols, final = columns(a, b)
    return [column_text(*c) for c in cols] + ["carry 1 write 1" if final[2] else "carry 0"]

def split_of(a, b):
    """0 train, 1 validation, 2 test (85 / 5 / 10%), by a hash of the unordered pair. a, b: integer arrays (n,).

    b + a goes where a + b goes, so that the test is not answered by the commuted training problem. The hash is the
    finalizer of splitmix64 (Steele et al. 2014).
    """
    a, b = np.asarray(a, dtype=np.uint64), np.asarray(b, dtype=np.uint64)
    x = np.minimum(a, b) * np.uint64(0x9E3779B97F4A7C15) + np.maximum(a, b)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    bucket = (x ^ (x >> np.uint64(31))) % np.uint64(100)
    return np.where(bucket < 85, 0, np.where(bucket < 90, 1, 2))

TRAIN, VALIDATION, TEST = 0, 1, 2

class Sums:
    """The task: a + b of equally long numbers, in one vocabulary. A problem is a row (a, b) of integers; its length D,
    here the digits of an operand, is one less than its slots. Another task has the same names: see Problems."""
    families, items, example, form = tuple(QUESTIONS), (), "a sum as 347+285", r"(\d+) *\+ *(\d+)"

    def __init__(self, lengths=(2, 3), seed=False):
        self.lengths, self.seed = lengths, seed
        self.mark = " " if seed else "="

    def texts(self, length):
        """Steps and answers of problems of this length, the longest among them."""
        return [column_text(9, 9, 1, 9, 1)], ["9" * (length + 1)]

    def draw(self, rng, split, length, n, distinct=False):
        """n problems of one length from one split -> (n, 2) int array; `distinct`: none twice (then maybe fewer)."""
        lo, hi = 10 ** (length - 1), 10**length
        pairs = rng.integers(lo, hi, size=(40 * n + 1000, 2))
        pairs = pairs[split_of(pairs[:, 0], pairs[:, 1]) == split]
        if distinct:
            pairs = pairs[np.sort(np.unique(pairs, axis=0, return_index=True)[1])]
        return pairs[:n]

    def length(self, a):
        return len(str(a))

    def problem(self, a, b):
        return f"{a} + {b} =" if self.seed else f"{a}+{b}"

    def steps(self, a, b):
        """The steps that thoughts stand for. The seed has none for a final carry of 0, so that their number tells."""
        return [step for step in steps_of(a, b) if not (self.seed and step == "carry 0")]

    def answer(self, a, b):
        return str(a + b)

    def asked(self, rng, pairs):
        """The slots that oracles are asked about in training: the last half as often, since it has two answers."""
        D = self.length(pairs[0, 0])
        return rng.choice(D + 1, size=len(pairs), p=[2 / (2 * D + 1)] * D + [1 / (2 * D + 1)])

    def final(self, a, b, slot):
        """Slots that are left out of what is compared: here the final carry's, which has two possible steps."""
        return slot == len(str(a))

    def typed(self, a, b):
        """A problem as typed -> (a, b). Raises UserError."""
        if len(a) != len(b) or len(a) not in self.lengths or "0" in (a[0], b[0]):
            raise UserError(f"{a[:20]}+{b[:20]}: this model adds two numbers of "
                            f"{' or '.join(map(str, self.lengths))} digits")
        return int(a), int(b)

class Problems:
    """The task of a file: items (question, steps, answer). A problem is a row (index, 0); all have as many slots as the
    longest, the others' last steps being empty. Names as in Sums."""
    families, mark, seed, example, form = ("step", "answer"), "", False, "a problem's number", r"(\d{1,9})()"

    def __init__(self, items, crc):
        self.items, self.crc, slots = items, crc, max(len(steps) for _, steps, _ in items)
        self.lengths = (slots - 1,)
        plain = [" ".join(question.lower().split()) for question, _, _ in items]  # nearly the same is the same
        self.hashes = np.array([zlib.crc32(question.encode()) for question in plain], dtype=np.uint64)
        self.split = split_of(self.hashes, np.zeros_like(self.hashes))

    def texts(self, length):
        return [step for _, steps, _ in self.items for step in steps], [answer for *_, answer in self.items]

    def draw(self, rng, split, length, n, distinct=False):
        own = np.flatnonzero(self.split == split)
        once = own[np.unique(self.hashes[own], return_index=True)[1]]
        index = rng.permutation(once)[:n] if distinct else rng.choice(own, n)
        return np.stack([index, np.zeros_like(index)], axis=1)

    def length(self, a):
        return self.lengths[0]

    def problem(self, a, b):
        return self.items[a][0]

    def steps(self, a, b):
        steps = self.items[a][1]
        return [*steps, *[""] * (self.lengths[0] + 1 - len(steps))]

    def answer(self, a, b):
        return self.items[a][2]

    def asked(self, rng, pairs):  # a tenth of the time, the first empty step too
        steps = np.array([len(self.items[a][1]) for a, _ in pairs])
        return rng.integers(np.minimum(steps + (rng.random(len(pairs)) < 0.1), self.lengths[0] + 1))

    def final(self, a, b, slot):
        return slot >= len(self.items[a][1])

    def typed(self, a, b):
        if int(a) >= len(self.items):
            raise UserError(f"{a}: the problems are numbered from 0 to {len(self.items) - 1}")
        return int(a), 0

@lru_cache(maxsize=1)
def read_problems(path):
    """A --data file -> Problems. Raises UserError."""
    try:
        content = Path(path).read_bytes()
        items = [(x["question"], x["steps"], x["answer"]) for x in json.loads(content)]
        for n, (question, steps, answer) in enumerate(items):
            texts = (question, *steps, answer)
            if not steps or not isinstance(steps, list) or any(name in x for x in texts for name in RESERVED):
                raise UserError(f"--data {path}: problem {n} must have a list of steps, and no special tokens")
            "".join(texts).encode()
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as e:
        raise UserError(f'--data {path} is no JSON list of {{"question", "steps", "answer"}} ({e})') from None
    problems = Problems(items, zlib.crc32(content)) if items else None
    if not items or min(np.bincount(problems.split, minlength=3)) < 2:
        raise UserError(f"--data {path} holds {len(items)} problems, too few to hold some out: add more")
    return problems

def chunks(problems):
    """Problems (a list of (n, 2), one per length) in even batches (<= 250, 2): bounded memory, and nobody alone."""
    return [part for pairs in problems for part in np.array_split(pairs, math.ceil(len(pairs) / 250))]

def rng_of(seed, *where):
    """A generator for one purpose and step. Data is a function of (seed, purpose, step): resuming replays nothing."""
    return np.random.default_rng([seed, *(zlib.crc32(w.encode()) if isinstance(w, str) else w for w in where)])

class Text:
    """Text <-> token ids: tiktoken with GPT-2's split pattern, but one token per digit.

    From scratch the vocabulary is the 256 bytes, then the words of the task whole (tiktoken takes a piece that is in
    its ranks as one token), then <|endoftext|> and the four special tokens.
    """
    # GPT-2's pattern (openai/gpt-2 encoder.py) with ` ?\p{N}` in place of ` ?\p{N}+`
    PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""

    def __init__(self, ranks=None, task=None):
        self.task = task or Sums()
        self.seed = self.task.seed
        self.questions = SEED_QUESTIONS if self.seed else {family: HELD_OUT[family] for family in self.task.families}
        if ranks is None:
            corpus = [q for asked in TRAINED.values() for q in asked] + ["Layer write carry neither", *NO_YES]
            corpus += [text for item in self.task.items for text in (item[0], *item[1], item[2])]
            common = Counter(word for part in corpus for word in re.findall(r"[A-Za-z]+", part)).most_common(5000)
            words = sorted({w for word, _ in common for w in (word, " " + word)})
            pieces = [bytes([i]) for i in range(256)] + [f" {d}".encode() for d in range(10)]
            ranks = {piece: i for i, piece in enumerate(pieces + [w.encode() for w in words if len(w) > 1])}
        special = {name: len(ranks) + i for i, name in enumerate(RESERVED)}
        self.pattern = self.PATTERN.replace(r"\p{N}|", r"\p{N}+|") if self.seed else self.PATTERN
        self.enc = tiktoken.Encoding("cocoracle", pat_str=self.pattern, mergeable_ranks=ranks, special_tokens=special)
        self.eos, self.bot, self.sep, self.eot, self.act = (special[name] for name in RESERVED)
        self.size = self.enc.n_vocab
        self.ids = lru_cache(maxsize=4096)(lambda s: tuple(self.enc.encode(s, allowed_special="all")))
        steps, answers = zip(*((max(len(self.ids(x)) for x in texts) for texts in self.task.texts(length))
                               for length in self.task.lengths))
        self.step_tokens, self.answer_tokens = max(steps) + 1, dict(zip(self.task.lengths, answers))

    def show(self, ids):
        """Ids up to the first <|endoftext|> (or the padding -1) as text."""
        ids = [int(i) for i in ids]
        end = next((n for n, i in enumerate(ids) if i in (self.eos, -1)), len(ids))
        return self.enc.decode(ids[:end])

def put(x, device):
    """An array, or a list, on the device; the host does not wait for it."""
    return torch.from_numpy(np.asarray(x)).to(device, non_blocking=True)

class Batch(NamedTuple):
    """Problems of one length. `*_target[t]` is the token that position t must predict, or IGNORE."""
    prefix: torch.Tensor  # (B, T) problem <bot> and the text steps, padded on the left
    valid: torch.Tensor  # (B, T) bool, False at padding
    text_target: torch.Tensor  # (B, T') for the last T' positions of the prefix: the text steps; T' = 0 without any
    answer: torch.Tensor  # (B, D+1 or D+2) <eot> and the answer, padded on the right
    answer_target: torch.Tensor  # the same shape
    tokens: int  # to be predicted: in the whole batch, where these are some of its rows

def pad(rows, fill, left=False):
    """Sequences of ids -> (n, longest) int array, filled up on one side."""
    width = max(map(len, rows))
    fills = [(fill,) * (width - len(row)) for row in rows]
    return np.array([(*f, *row) if left else (*row, *f) for f, row in zip(fills, rows)], dtype=np.int64)

ALL = slice(None)  # the rows of a whole batch

def make_batch(text, pairs, n_text, device="cpu", rows=ALL):
    """Problems (n, 2) of one length with their first n_text steps as text -> these rows of a Batch."""
    heads, bodies, answers = [], [], []
    for a, b in pairs.tolist():
        heads.append(text.ids(text.task.problem(a, b) + text.task.mark + "<bot>"))
        bodies.append(tuple(i for step in text.task.steps(a, b)[:n_text] for i in (*text.ids(step), text.sep)))
        said = text.task.answer(a, b)
        answers.append(text.ids(f"<eot> {said}" if text.seed else f"<eot>{said}<|endoftext|>"))
    prefix = [head + body for head, body in zip(heads, bodies)]
    valid = pad([(1,) * len(row) for row in prefix], 0, left=True) == 1
    # Targets stand one to the left of their tokens, since position t predicts t+1; the harness feeds what follows the
    # last <sep>, so nothing is to be predicted there.
    arrays = (pad(prefix, text.eos, left=True), valid,
              pad([(*body, IGNORE) if n_text else () for body in bodies], IGNORE, left=True),
              pad([row[:-1] for row in answers], text.eos), pad([row[1:] for row in answers], IGNORE))
    tokens = sum(int((arrays[target] != IGNORE).sum()) for target in (2, 4))
    batch = Batch(*(put(x[rows], device) for x in arrays), tokens)
    return batch._replace(valid=None) if valid.all() else batch

# -----------------------------------------------------------------------------------------------------------
# 4. GPT-2: names and layouts of the released state dict (openai/gpt-2 src/model.py)
class Conv1D(nn.Module):
    """GPT-2's linear layer, y = x W + b with W stored (in, out), and room for a LoRA adapter (section 6)."""

    def __init__(self, n_in, n_out, std):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(n_in, n_out) * std)
        self.bias = nn.Parameter(torch.zeros(n_out))
        self.cast = None  # the weight in bfloat16, within amp() (section 7)
        self.lora_scale = 0.0

    def forward(self, x):
        """(N, in) -> (N, out)."""
        y = torch.addmm(self.bias, x, self.weight if self.cast is None else self.cast)
        if self.lora_scale:
            y = y + (x @ self.lora_a) @ self.lora_b * self.lora_scale
        return y

class Attention(nn.Module):
    def __init__(self, width, heads, std, out_std):
        super().__init__()
        self.c_attn = Conv1D(width, 3 * width, std)
        self.c_proj = Conv1D(width, width, out_std)
        self.heads = heads

    def forward(self, qkv, past, mask, last):
        """qkv (B, T, 3C); past: keys and values (B, H, S, C/H) or None; mask bool (B|1, 1, last, S+T) or None: causal.
        -> (B, last, C), before c_proj, for the last positions only; the longer keys and values."""
        B, T, width = qkv.shape
        q, k, v = qkv.view(B, T, 3, self.heads, -1).permute(2, 0, 3, 1, 4)  # each (B, H, T, C/H)
        if past is not None:
            k, v = torch.cat([past[0], k], dim=2), torch.cat([past[1], v], dim=2)
        q = q[:, :, T - last:]
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None and last > 1)
        return y.transpose(1, 2).reshape(B, last, width // 3), (k, v)

class MLP(nn.Module):
    def __init__(self, width, std, out_std):
        super().__init__()
        self.c_fc = Conv1D(width, 4 * width, std)
        self.c_proj = Conv1D(4 * width, width, out_std)

    def forward(self, x):
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))

class Block(nn.Module):
    def __init__(self, width, heads, std, out_std):
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = Attention(width, heads, std, out_std)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = MLP(width, std, out_std)

    def before(self, x):
        """(N, C) -> (N, 3C): keys, queries and values."""
        return self.attn.c_attn(self.ln_1(x))

    def after(self, x, y):
        """The residual stream (N, C) and what attention found -> the residual stream after the block."""
        x = x + self.attn.c_proj(y)
        return x + self.mlp(self.ln_2(x))

    def compile(self, **how):
        """Compile all but attention, which has a kernel of its own. Being functions of rows (N, C), they are compiled
        once each for all prefixes, thoughts and answers: whole blocks were compiled anew 17 times."""
        self.before, self.after = (torch.compile(f, dynamic=True, **how) for f in (self.before, self.after))

    def forward(self, x, past, mask, last):
        B, T, C = x.shape
        y, kv = self.attn(self.before(rows_of(x)).view(B, T, 3 * C), past, mask, last)
        return self.after(rows_of(x[:, T - last:]), rows_of(y)).view(B, last, C), kv

def rows_of(x):
    """(B, T, C) -> (B T, C), which is no view in autograd's books: views of all kinds are compiled for anew."""
    return torch.ops.aten._unsafe_view(x.contiguous(), (-1, x.shape[-1]))

class Cache(NamedTuple):
    """What earlier calls leave to later ones."""
    kv: tuple  # per layer: keys and values, each (B, H, S, C/H)
    valid: torch.Tensor | None  # (B, S) bool: positions that may be attended to; None: all
    pos: torch.Tensor | int  # position of the next token: (B, 1), or one for all rows

    def map(self, change):
        """The cache with every layer's keys and values changed."""
        return self._replace(kv=tuple((change(k), change(v)) for k, v in self.kv))

class GPT(nn.Module):
    def __init__(self, n_vocab, layers, heads, width, positions):
        super().__init__()
        # 0.018 at GPT-2's width of 768 (GPT-2: 0.02); scaled so, small widths start as well
        std = 0.5 / math.sqrt(width)
        out_std = std / math.sqrt(2 * layers)  # residual branches, GPT-2 section 2.3
        self.wte = nn.Embedding(n_vocab, width)
        self.wpe = nn.Embedding(positions, width)
        self.h = nn.ModuleList(Block(width, heads, std, out_std) for _ in range(layers))
        self.ln_f = nn.LayerNorm(width)
        nn.init.normal_(self.wte.weight, std=std)
        nn.init.normal_(self.wpe.weight, std=std / 2)

    def forward(self, x, cache=None, valid=None, read=(), inject=None, last=None):
        """Run embeddings through the blocks, after what `cache` holds.

        x (B, T, C): token embeddings or thoughts, without positions; valid (B, T) bool: False at padding (anywhere);
        read: layers; inject: an Injection below the last layer; last: how many hidden states are wanted, counted from
        the end (default all). -> hidden states after ln_f (B, last, C), the longer cache, and the residual streams of
        the layers in `read`, (B, T, len(read), C) or None.
        """
        B, T, _ = x.shape
        last = last or T
        past = cache or Cache((None,) * len(self.h), None, 0)
        S = 0 if past.kv[0] is None else past.kv[0][0].shape[2]
        x, pos = self.place(x, valid, past.pos)
        if valid is not None or past.valid is not None:
            old = past.valid if past.valid is not None else torch.ones(B, S, dtype=torch.bool, device=x.device)
            new = valid if valid is not None else torch.ones(B, T, dtype=torch.bool, device=x.device)
            valid = torch.cat([old, new], dim=1)
        kv, readings = [], []
        mask = attention_mask(T, S, valid, x.device)
        for layer, block in enumerate(self.h):
            x = inject.at(layer, x) if inject else x
            if layer in read:
                readings.append(x)
            # The last block is spared what nobody reads: tiny's oracle step, 2 CPU cores, 71 -> 57 ms.
            n = last if layer + 1 == len(self.h) else T
            x, kv_layer = block(x, past.kv[layer], mask if n == T else attention_mask(n, S + T - n, valid, x.device), n)
            kv.append(kv_layer)
        if len(self.h) in read:
            readings.append(x)
        return self.ln_f(x), Cache(tuple(kv), valid, pos), torch.stack(readings, dim=2) if readings else None

    def place(self, x, valid, pos):
        """Add position embeddings, counting real tokens only, from `pos` on. -> x, position of the next token."""
        T = x.shape[1]
        if valid is None and isinstance(pos, int):
            return x + self.wpe.weight[pos:pos + T], pos + T
        count = torch.ones_like(x[:, :, 0], dtype=torch.long) if valid is None else valid.long()
        # (B, T); padding before the first token gets position 0, and text that runs away stays at the last one
        at = (pos + count.cumsum(1) - 1).clamp(0, len(self.wpe.weight) - 1)
        return x + self.wpe(at), pos + count.sum(1, keepdim=True)

    def logits(self, h):
        """Hidden states (..., C) -> logits (..., V); the head is tied to the token embedding."""
        return F.linear(h, self.wte.weight)

def attention_mask(T, S, valid, device):
    """Bool (B|1, 1, T, S+T), True where query may see key; None where plain causal attention says the same.

    A padding query still sees itself: a softmax over nothing would be NaN. No real query sees padding.
    """
    if valid is None and (S == 0 or T == 1):
        return None
    mask = torch.ones(T, S + T, dtype=torch.bool, device=device).tril(diagonal=S)[None]
    if valid is not None:
        itself = torch.eye(T, dtype=torch.bool, device=device)
        mask = mask & (valid[:, None, :] | F.pad(itself, (S, 0))[None])
    return mask[:, None]

# -----------------------------------------------------------------------------------------------------------
# 5. Thinking: continuous thoughts (Coconut, section 3) and greedy writing
class Thoughts(NamedTuple):
    """How the model is to think: how many thoughts, what they are fed, and what the answer sees of the rest."""
    count: int
    pause: int | None = None  # feed this token's embedding instead of the last hidden state
    bottleneck: bool = False  # drop the prefix from the cache afterwards: the answer sees the thoughts alone

def think(model, h, cache, thoughts, read=()):
    """Continuous thoughts: each takes the last hidden state of the position before as its input embedding.

    h (B, 1, C): hidden state of the position before. -> the cache for the answer, and readings (B, K, len(read), C) or
    None. Gradients pass through all thoughts.
    """
    readings = []
    for _ in range(thoughts.count):
        x = h if thoughts.pause is None else model.wte.weight[thoughts.pause].expand_as(h)
        h, cache, reading = model(x, cache, read=read)
        readings.append(reading)
    if thoughts.bottleneck:
        valid = None if cache.valid is None else cache.valid[:, -thoughts.count:]
        cache = cache.map(lambda x: x[:, :, -thoughts.count:])._replace(valid=valid)
    return cache, torch.cat(readings, dim=1) if read and readings else None

@torch.no_grad()
def write(model, h, cache, stop, limit, times=1, hold=(0, ())):
    """Greedy text after hidden state h (B, 1, C), until each row has written `stop` `times` times, or `limit` tokens.

    hold: (n, ids): none of these ids is among the first n tokens.
    -> ids (B, <= limit), -1 after a row's end; the hidden state (B, 1, C) at each row's last token; the cache.
    """
    left = torch.full((h.shape[0],), times, device=h.device)
    out = []
    for n in range(limit):
        alive = left > 0
        if not alive.any():
            break
        logits = model.logits(h[:, 0])
        if n < hold[0]:
            logits[:, hold[1]] = -math.inf
        token = logits.argmax(-1)
        out.append(torch.where(alive, token, -1))
        left = left - ((token == stop) & alive).long()
        new, cache, _ = model(model.wte(token)[:, None], cache, valid=alive[:, None])
        h = torch.where(alive[:, None, None], new, h)
    return torch.stack(out, dim=1), h, cache

def plan(cfg, text, pairs, k):
    """Stage k on problems of one length -> (number of text slots, Thoughts). k None: answer at once. In the seed's
    protocol there are as many thoughts as gold steps, which tells the final carry; in ours D+1."""
    slots = len(text.task.steps(*pairs[0].tolist()))
    latent = min(k or 0, slots)
    return 0 if k is None else slots - latent, Thoughts(
        latent * cfg.thoughts_per_slot, text.bot if cfg.thoughts == "pause" else None, (k or 0) > max(cfg.digits) + 1)

@torch.no_grad()
def ponder(cfg, text, model, pairs, k, read=()):
    """Read problems (n, 2) of one length, write the text steps of stage k, think. -> cache, readings as of think()."""
    text_slots, thoughts = plan(cfg, text, pairs, k)
    batch = make_batch(text, pairs, 0, model.wte.weight.device)
    h, cache, _ = model(model.wte(batch.prefix), valid=batch.valid, last=1)
    if text_slots:
        _, h, cache = write(model, h, cache, text.sep, limit=text_slots * text.step_tokens, times=text_slots)
    return think(model, h, cache, thoughts, read)

@torch.no_grad()
def answer(text, model, cache, length):
    """Greedy answers (a list of text) after the thoughts in the cache; "..." stands for a missing end token."""
    B = cache.kv[0][0].shape[0]
    eot = torch.full((B, 1), text.eot, device=model.wte.weight.device)
    h, cache, _ = model(model.wte(eot), cache)
    ids, _, _ = write(model, h, cache, text.eos, limit=15 if text.seed else text.answer_tokens[length] + 2)
    answers = [text.show(row) if text.eos in row else text.show(row) + "..." for row in ids.tolist()]
    if text.seed:  # its model never learnt to end an answer; its demo stops at the first character that is no digit
        answers = [re.match(r"\s*(\d*)", said)[1] for said in answers]
    return answers

def exchange(cache, donor, at):
    """The cache with the donor's keys and values at the thoughts where `at` (B, K) bool is True: all that later
    positions see of them. Both caches end in K thoughts."""
    def mix(own, other):  # (B, H, S, C/H)
        return torch.where(F.pad(at, (own.shape[2] - at.shape[1], 0))[:, None, :, None], other, own)
    return cache._replace(kv=tuple((mix(k, dk), mix(v, dv)) for (k, v), (dk, dv) in zip(cache.kv, donor.kv)))

def thoughts_of(cfg, D, slots):
    """True at the thoughts of a slot, or of one slot for each problem (B, 1) -> bool (B|1, K)."""
    slot_of = np.arange((D + 1) * cfg.thoughts_per_slot) // cfg.thoughts_per_slot
    return put((slot_of == slots).reshape(-1, len(slot_of)), cfg.device)

# -----------------------------------------------------------------------------------------------------------
# 6. Injection (Activation Oracles, section 3) and LoRA
class Injection(NamedTuple):
    """Readings to be added to the residual stream: h' = h + scale * ||h|| * v / ||v||, at given positions only."""
    vectors: dict  # layer -> (B, A, C), one per <act> token
    positions: torch.Tensor  # (A,), the same in all rows
    scale: float

    def at(self, layer, x):
        """x (B, T, C) with the vectors for this layer added, out of place."""
        if layer not in self.vectors:
            return x
        v = self.vectors[layer]
        size = self.scale * x.index_select(1, self.positions).norm(dim=-1, keepdim=True)
        added = size * v / v.norm(dim=-1, keepdim=True).clamp_min(1e-8)
        return x.index_add(1, self.positions, added.to(x.dtype))

def add_lora(model, rank):
    """Freeze the model and give every block matrix an adapter W + 2 A B (LoRA, section 4.1; alpha = 2 rank).

    B starts at zero, so the model is unchanged at first.
    """
    model.requires_grad_(False)
    for module in model.modules():
        if isinstance(module, Conv1D):
            n_in, n_out = module.weight.shape
            like = dict(device=module.weight.device, dtype=module.weight.dtype)
            module.lora_a = nn.Parameter(torch.randn(n_in, rank, **like) / math.sqrt(n_in))
            module.lora_b = nn.Parameter(torch.zeros(rank, n_out, **like))
            module.lora_scale = 2.0

# -----------------------------------------------------------------------------------------------------------
# 7. Training kit
class Run(NamedTuple):
    """What every part needs: configuration, text, directory. Weights and figures live in the directory."""
    cfg: Config
    text: Text
    out: Path
    rank: int = 0  # of this process, among those that train together; the first one alone writes and prints
    world: int = 1  # their number

def released(cfg, files=gpt2_weights.FILES):
    """The directory with GPT-2's released files. Raises WeightsError."""
    return Path(cfg.weights) if cfg.weights else gpt2_weights.fetch(cfg.model, files)

def shapes_of(cfg, text):
    """Name -> shape of the whole state dict."""
    layers, _, width = SIZES[cfg.model]
    return gpt2_weights.gpt2_shapes(layers, width, text.size, cfg.positions)

def released_weights(cfg, text):
    """State dict of the released GPT-2 with rows for the special tokens; views of the file where that can be."""
    shapes = shapes_of(cfg, text) | {"wte.weight": (text.eos + 1, SIZES[cfg.model][2])}
    weights = read_safetensors(released(cfg) / "model.safetensors", shapes)
    wte = weights["wte.weight"].float()
    return {**weights, "wte.weight": torch.cat([wte, wte[[text.ids(token)[0] for token in SPECIAL.values()]]])}

def new_model(run, weights=None):
    """A model with the seed's random weights, or with these: taken over, not copied, so that a file's are read as they
    are used. With --compile the blocks are compiled in place, which leaves the state dict's names alone."""
    cfg = run.cfg
    torch.manual_seed(cfg.seed)
    # Without memory for what is replaced; tiny is spared the 1.4 s of imports that random numbers on "meta" cost.
    with torch.device("meta" if weights and cfg.model != "tiny" else "cpu"):
        model = GPT(run.text.size, *SIZES[cfg.model], cfg.positions)
    if weights:
        torch.manual_seed(cfg.seed)
        model.load_state_dict({name: w.float() for name, w in weights.items()}, assign=True)
    for block in model.h if cfg.compile else ():
        block.compile()
    return model.to(cfg.device)

def load_model(run, name):
    """A finished part's model. "base" is the stage-0 model, or the released GPT-2; "lora" is the base model with its
    adapters. Raises WeightsError."""
    cfg = run.cfg
    part = "base" if name == "lora" else name
    if part == "base" and cfg.pretrained:
        weights = released_weights(cfg, run.text)
    else:
        given = getattr(cfg, part, "")  # --coconut FILE.pt, --oracle FILE.pt
        path, read = (given, read_pickle) if given else (run.out / f"{part}.safetensors", read_safetensors)
        weights = read(path, shapes_of(cfg, run.text))
    model = new_model(run, weights)
    if name == "lora":
        add_lora(model, cfg.lora_rank)
        shapes = {key: tuple(v.shape) for key, v in model.state_dict().items() if ".lora_" in key}
        model.load_state_dict(read_safetensors(run.out / "lora.safetensors", shapes), strict=False)
    return model

@contextmanager
def amp(cfg, model):
    """bfloat16 matrix products in a model where asked for; weights and optimizer stay float32."""
    low = cfg.dtype == "bfloat16"
    matrices = [module for module in model.modules() if low and isinstance(module, Conv1D)]
    # The CPU's fused attention is slow backwards in bfloat16: 87 ms, plain products 19 (GPT-2 small, batch 128, 9
    # tokens; they need memory for tokens squared).
    kernels = sdpa_kernel(SDPBackend.MATH) if low and cfg.device == "cpu" else nullcontext()
    with torch.autocast(cfg.device, torch.bfloat16, enabled=low), kernels:
        # Once a step: autocast would cast once a thought in compiled blocks (GPT-2 small, 16 problems, 16 thoughts, 2
        # CPU cores: 3.4 -> 2.3 s, 5.4 -> 2.6 GB).
        outer = [module.cast for module in matrices]  # of an amp() around this one
        for module in matrices:
            module.cast = module.weight.bfloat16()
        try:
            yield
        finally:
            for module, cast in zip(matrices, outer):
                module.cast = cast

def write_text(path, content):
    """Write a file whole or not at all."""
    part = path.with_name(path.name + ".tmp")
    try:
        part.write_text(content, encoding="utf-8")
        os.replace(part, path)
    except OSError:
        part.unlink(missing_ok=True)
        raise

def save_part(run, name, weights):
    """A finished part's weights."""
    if not run.rank:
        write_safetensors(run.out / f"{name}.safetensors", weights)

def record(run, **sections):
    """Put sections into results.json: what several parts measure is merged, at every depth, the rest replaced."""
    def merge(old, new):
        both = isinstance(old, dict) and isinstance(new, dict)
        return {**old, **{key: merge(old.get(key), value) for key, value in new.items()}} if both else new
    results = load_json(run.out / "results.json")
    for name, new in sections.items():
        results[name] = merge(results.get(name), new) if name in ("coconut", "probes", "seconds") else new
    if not run.rank:
        write_text(run.out / "results.json", json.dumps(results, indent=1) + "\n")
    return results

FORMAT = 3  # of last.pt: to be raised when what is in it changes, or the training that goes on from it

def save_last(run, part, step, params, optimizers):
    """last.pt: where a run stands, for --resume; replaced whole."""
    path = run.out / "last.pt"
    temporary = run.out / "last.pt.tmp"
    try:
        torch.save({"run": identity(run.cfg), "part": part, "step": step, "params": [p.detach() for p in params],
                    "optimizers": [o.state_dict() for o in optimizers]}, temporary)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as e:
        if not isinstance(e, OSError) and type(e) is not RuntimeError:  # the device's errors are of other types
            raise
        temporary.unlink(missing_ok=True)
        raise UserError(f"{path} cannot be written ({e}): the one before is whole; make room, then --resume") from None

def identity(cfg):
    """What two processes must have in common to go on with each other's checkpoint -> {field: value as text}."""
    same = {name: json.dumps(value) for name, value in knobs(cfg).items() if name not in ANYTIME}
    return {"format": str(FORMAT), **same}

def load_last(run, part=None, params=(), optimizers=()):
    """With --resume: the part that last.pt stands in and, if it is `part`, its step; its state goes into the rest.
    Raises UserError on a damaged file, and on one of another run."""
    path = run.out / "last.pt"
    if not run.cfg.resume or not path.exists():
        return None, 0
    try:
        if zipfile.ZipFile(path).testzip():  # torch.load does not look at the checksums
            raise ValueError("altered")
        last = torch.load(path, map_location="cpu", weights_only=True)
        other = [(name, last["run"].get(name), value) for name, value in identity(run.cfg).items()
                 if last["run"].get(name) != value]
        if last["part"] == part and not other:
            with torch.no_grad():
                for p, old in zip(params, last["params"], strict=True):
                    p.copy_(old.view(p.shape))
            for optimizer, old in zip(optimizers, last["optimizers"], strict=True):
                optimizer.load_state_dict(old)
        reached = last["part"], int(last["step"]) if last["part"] == part else 0
    except Exception as e:  # a damaged or hostile file raises nearly anything
        raise UserError(f"{path} is no checkpoint of this run: delete it to train its part again") from e
    for name, theirs, ours in other:
        raise UserError(f"{path} is of a run with {name} {theirs}, this one has {ours}: delete it to train its part "
                        "again, or choose another --out")
    return reached

def make_optimizers(model, lr, muon_lr, decay):
    """AdamW on what is trainable; with muon_lr > 0, Muon (Jordan et al. 2024) on the blocks' matrices instead.

    After 500 oracle steps on the same thoughts, Muon's oracle read 0.70 of the steps, AdamW's 0.48 (single trials).
    """
    params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    matrices = [p for name, p in params.items() if muon_lr and p.ndim == 2 and name.startswith("h.")]
    rest = [p for p in params.values() if all(p is not m for m in matrices)]
    optimizers = [torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.98), weight_decay=decay, fused=True)] if rest else []
    optimizers += [torch.optim.Muon(matrices, lr=muon_lr, weight_decay=decay)] if matrices else []
    for group in [g for o in optimizers for g in o.param_groups]:
        group["peak"] = group["lr"]
    return optimizers

def train_step(run, model, optimizers, loss_of, step, parts=1):
    """One update by the batch of a step, taken in parts, whose gradients are summed over parts and processes.

    -> (loss, examples right, examples, 1. if not finite and therefore skipped) on the device, which the host does not
    wait for; the number of parts: more than before where memory ran out.
    """
    params = [p for p in model.parameters() if p.requires_grad]
    while True:
        told = torch.zeros(4, device=run.cfg.device)
        try:
            for part in range(parts):
                with amp(run.cfg, model):
                    rows = slice(run.rank + run.world * part, None, run.world * parts)
                    loss, right = loss_of(step, rows)
                loss.backward()
                told[:2] += torch.stack([loss.detach(), right.sum()])
                told[2] += len(right)
            break
        except torch.OutOfMemoryError:
            if run.cfg.micro_batch or 2 * parts * run.world > run.cfg.batch_size:
                raise UserError("out of memory: lower --micro-batch, or choose a smaller --model") from None
        parts = 2 * parts
        loss = right = None  # the failed graph goes, too
        for p in params:
            p.grad = None
    if run.world > 1:
        add_up([p.grad for p in params if p.grad is not None])
    told[3] = ~nn.utils.clip_grad_norm_(params, 1.0).isfinite()
    skip = any(isinstance(o, torch.optim.Muon) for o in optimizers) and bool(told[3])  # Muon must be told by the host
    for optimizer in optimizers:
        optimizer.found_inf = told[3]  # what AdamW's kernel looks at
        if not skip:
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return told, parts

def parts_of(run):
    """The number of parts that a process takes its share of a batch in, before memory runs out; none is empty."""
    size, world = run.cfg.batch_size, run.world
    return min(size // world, math.ceil(math.ceil(size / world) / (run.cfg.micro_batch or size)))

def add_up(tensors):
    """Replace each tensor by its sum over all processes, which talk but once."""
    joined = torch.cat([x.flatten() for x in tensors])
    torch.distributed.all_reduce(joined)
    for x, total in zip(tensors, joined.split([x.numel() for x in tensors])):
        x.copy_(total.view_as(x))

def fit(run, part, model, recipe, loss_of):
    """The training loop of every part: linear warm-up over 50 steps, then linear decay to zero.

    recipe: steps, AdamW's rate, Muon's, weight decay; loss_of(step, rows) -> (loss, (B,) which examples are right) of
    these rows of the step's batch, its data a function of the step.
    """
    (steps, *rates), cfg, begin = recipe, run.cfg, time.time()
    optimizers = make_optimizers(model, *rates)
    params = [p for p in model.parameters() if p.requires_grad]
    _, first = load_last(run, part, params, optimizers)
    logged = begin
    due = begin + cfg.save_every
    parts = parts_of(run)
    sums = torch.zeros(4, device=cfg.device)  # of what train_step tells, since the last log line
    count = 0  # of the steps since then
    streak = worst = torch.zeros((), device=cfg.device)  # steps in a row that were not finite: now, and at most
    with held_signals() as signals:
        for step in range(first, steps):
            for group in [g for o in optimizers for g in o.param_groups]:
                group["lr"] = group["peak"] * min((step + 1) / 50, 1 - step / steps)
            told, parts = train_step(run, model, optimizers, loss_of, step, parts)
            # These stay on the device: the host does not wait for them within the interval, and makes the next step's
            # data meanwhile.
            sums = sums + told.nan_to_num(0, 0, 0)
            streak = (streak + 1) * told[3]
            worst = torch.maximum(worst, streak)
            count += 1
            now = time.time()
            if (step + 1) % cfg.log_every == 0 or step + 1 == steps:
                if worst >= 10:
                    raise UserError(f"{part}: 10 steps in a row had no finite gradient: train again with a lower rate, "
                                    "or with --dtype float32 (last.pt, if there, is from before)")
                log(run, part, step + 1, steps, sums, count, now - logged,
                    (now - begin) / (step + 1 - first) * (steps - step - 1))
                logged = time.time()
                count = 0
                sums = torch.zeros_like(sums)
            if run.rank == 0 and (signals or now > due or step + 1 == steps):
                save_last(run, part, step + 1, params, optimizers)
                due = time.time() + max(cfg.save_every, 50 * (time.time() - now))  # at most 2% of the time
            if signals and not run.rank:  # torchrun ends the others
                raise KeyboardInterrupt

@contextmanager
def held_signals():
    """Collects Ctrl-C and SIGTERM, for whoever wants to finish something first."""
    caught, kinds = [], (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(kind, lambda number, frame: caught.append(number)) for kind in kinds]
    try:
        yield caught
    finally:
        for kind, handler in zip(kinds, before):
            signal.signal(kind, handler)

def log(run, part, step, steps, sums, count, seconds, eta):
    """One line on the terminal and one object in log.jsonl, of the last `count` steps; sums: as told by train_step."""
    if run.world > 1:
        add_up([sums])
    loss, right, examples, skipped = sums.tolist()
    if run.rank:
        return
    loss = loss / count
    exact = right / examples
    speed = examples / seconds
    skipped = int(skipped / run.world)
    line = (f"{part:<11} | step {step:>5}/{steps} | loss {loss:5.3f} | exact {exact:4.2f} | {speed:5,.0f} ex/s | "
            f"eta {int(eta) // 60}:{int(eta) % 60:02d}" + f" | {skipped} steps skipped" * (skipped > 0))
    if sys.stdout.isatty() and step < steps:  # the next line is drawn over this one
        print("\033[K" + line[:shutil.get_terminal_size().columns - 1], end="\r", flush=True)
    else:
        print(line, flush=True)
    with open(run.out / "log.jsonl", "a") as f:
        f.write(json.dumps({"part": part, "step": step, "steps": steps, "loss": round(loss, 6),
                            "exact": round(exact, 6), "skipped": skipped,
                            "examples_per_second": round(speed, 1)}) + "\n")

# -----------------------------------------------------------------------------------------------------------
# 8. Coconut: from text steps to thoughts
def coconut_loss(model, batch, thoughts, read=()):
    """Cross-entropy on what the model must write: its text steps and the answer, never the problem's digits.

    -> loss; (B,) 1. where the whole answer is right under teacher forcing, else 0.; readings.
    """
    n_text = batch.text_target.shape[1]
    h, cache, _ = model(model.wte(batch.prefix), valid=batch.valid, last=max(n_text, 1))
    cache, readings = think(model, h[:, -1:], cache, thoughts, read)
    said, _, _ = model(model.wte(batch.answer), cache)
    written = torch.cat([h[:, h.shape[1] - n_text:], said], dim=1)  # logits only where they are used
    target = torch.cat([batch.text_target, batch.answer_target], dim=1)
    logits = model.logits(written)
    return token_loss(logits, target, batch.tokens), all_right(logits[:, n_text:], batch.answer_target), readings

def token_loss(logits, target, tokens):
    """Cross-entropy of the targets, summed and divided by the number of tokens in the whole batch: the losses of a
    batch's parts add up to its mean, and so do their gradients."""
    total = F.cross_entropy(logits.flatten(0, 1).float(), target.flatten(), ignore_index=IGNORE, reduction="sum")
    return total / tokens

def all_right(logits, target):
    """Rows (B,) whose every target token has the highest logit, as 0. or 1."""
    return ((logits.argmax(-1) == target) | (target == IGNORE)).all(dim=1).float()

def coconut_step(run, model, step, k, purpose, size, explain=0.0, rows=ALL):
    """Loss and exactness of these rows of a training step at stage k: one operand length a batch.

    explain: weight of the self-oracle's loss on the live readings of one thought of each problem, which asks a thought
    to hold the step that it stands for (as SIM-CoT, arXiv:2509.20317, whose decoder is a model of its own).
    """
    cfg, text = run.cfg, run.text
    rng = rng_of(cfg.seed, purpose, step)
    pairs = text.task.draw(rng, TRAIN, int(rng.choice(cfg.digits)), size)
    text_slots, thoughts = plan(cfg, text, pairs, k)
    batch = make_batch(text, pairs, text_slots, cfg.device, rows)
    loss, exact, readings = coconut_loss(model, batch, thoughts, cfg.layers if explain else ())
    if readings is not None:
        readings = readings[:, cfg.thoughts_per_slot - 1::cfg.thoughts_per_slot]  # each slot's last thought
        latent = rng.integers(readings.shape[1], size=size)
        targets = [text.task.steps(a, b)[text_slots + i] for (a, b), i in zip(pairs.tolist(), latent.tolist())]
        prompts = [prompt(cfg, str(rng.choice(TRAINED["step"])), cfg.layers)] * size
        vectors = readings[put(np.arange(len(readings)), cfg.device), put(latent[rows], cfg.device)]
        loss = loss + explain * oracle_loss(run, model, prompts, targets, vectors, rows)[0]
    return loss, exact

def train_coconut(run):
    """The curriculum: text, then ever more latent slots. Each stage is measured on the test split as it ends."""
    cfg = run.cfg
    model = load_model(run, "base") if cfg.pretrained else new_model(run)
    # Weight decay leaves more in a thought to read: on validation, after 600 oracle steps, 0.53 and 0.58 of the steps
    # where the last stage had none (two trials), 0.61 to 0.81 where it had 0.1 to 0.5 (eleven).
    recipes = {"0": cfg.train_text, "all": cfg.train_latent}
    names = [f"coconut {name}" for name in cfg.curriculum]
    reached, _ = load_last(run)
    begin = names.index(reached) if reached in names else 0
    for part, (name, k) in [*zip(names, cfg.curriculum.items())][begin:]:
        def loss_of(step, rows):
            return coconut_step(run, model, step, k, part, cfg.batch_size, cfg.explain, rows)
        fit(run, part, model, recipes.get(name, (cfg.train_mixed[0] * k, *cfg.train_mixed[1:])), loss_of)
        if run.rank:
            continue
        if k == 0 and not cfg.pretrained:
            save_part(run, "base", model.state_dict())
        scores = coconut_scores(run, model, k)
        print(f"{part:<11} | held-out exact match {show_rate(scores)}, teacher-forced "
              f"{scores['teacher_forced']['exact']:.3f}", flush=True)
        record(run, coconut={"stages": {name: scores}})
    save_part(run, "coconut", model.state_dict())

# -----------------------------------------------------------------------------------------------------------
# 9. Oracles: read a thought's hidden state in words
class Runs(NamedTuple):
    """Problems of one length, thought about with all slots latent; in patched runs one slot's thoughts are not own."""
    pairs: np.ndarray  # (n, 2)
    readings: torch.Tensor  # (n, slots, L+1, C): every layer of each slot's last thought
    wrote: np.ndarray | None  # (n, D) str: the digits that the answer then had, lowest column first; "" for none

@torch.no_grad()
def think_about(run, model, pairs, rng=None):
    """-> Runs, without answers. With rng: Runs with answers, and the same with one slot, a random one of each problem,
    exchanged for the problem before's."""
    cfg, D, every = run.cfg, run.text.task.length(pairs[0, 0]), run.cfg.thoughts_per_slot
    with amp(cfg, model):
        cache, read = ponder(cfg, run.text, model, pairs, cfg.last, read=range(len(model.h) + 1))
        def runs(cache, read, answered):
            wrote = digits_of(answer(run.text, model, cache, D), D) if answered else None
            return Runs(pairs, read[:, every - 1::every].float(), wrote)
        if rng is None:
            return runs(cache, read, False)
        at = thoughts_of(cfg, D, rng.integers(D + 1, size=(len(pairs), 1)))
        patched = torch.where(at[:, :, None, None], read.roll(1, 0), read)
        return runs(cache, read, True), runs(exchange(cache, cache.map(lambda x: x.roll(1, 0)), at), patched, True)

def digits_of(answers, D):
    """Answers as text -> (n, D) str: the digits of the lowest D columns, lowest first; "" where there is none."""
    return np.array([[re.sub(r"\D", "", said[::-1][c:c + 1]) for c in range(D)] for said in answers])

def text_says(text, a, b, slot, family):
    """The text that answers a question of this family about the thought of a slot of a problem."""
    if family in ("step", "answer", "problem"):
        task = text.task
        return {"step": task.steps(a, b)[slot], "answer": task.answer(a, b), "problem": task.problem(a, b)}[family]
    _, _, carry_in, digit, carry_out = columns(a, b)[slot]
    return {"carry_in": NO_YES[carry_in], "carry_out": NO_YES[carry_out], "digit": str(digit), "column": str(slot),
            "longer": NO_YES[a + b >= 10 ** len(str(a))]}[family]

def model_says(runs, i, column, family):
    """The text that answers a question of this family about what the model wrote in run i."""
    digit, a, b = runs.wrote[i, column], *(int(n) // 10**column % 10 for n in runs.pairs[i])
    return str(digit) if family == "written" else [*NO_YES, "neither"][min(2, (int(digit or 0) - a - b) % 10)]

def whitener(run, model, whiten=True):
    """-> function of readings (..., L+1, C): those of the layers read, (..., R, C), each layer's centred and of unit
    variance in all directions if `whiten`.

    Thoughts vary by orders of magnitude more along what the model uses than along the rest; injected as they are, the
    rest is lost. ZCA (Kessy et al. 2018) is the whitening that stays closest to the residual stream's own axes. Its
    statistics are a function of the model and of training readings alone.
    """
    cfg, layers = run.cfg, list(run.cfg.layers)
    def taken(readings):
        return readings.index_select(-2, put(layers, readings.device))
    if not whiten:
        return taken
    train = chunks(run.text.task.draw(rng_of(cfg.seed, "whiten", d), TRAIN, d, 1000) for d in cfg.digits)
    x = torch.cat([think_about(run, model, pairs).readings[:, :, layers].flatten(0, 1) for pairs in train]).double()
    zca = []
    for layer in (x - x.mean(0)).unbind(1):
        variance, axes = torch.linalg.eigh(torch.cov(layer.T))
        zca.append(axes @ torch.diag((variance.clamp_min(0) + 1e-6 * variance.max()).rsqrt()) @ axes.T)
    mean, zca = x.mean(0), torch.stack(zca)
    # float64: autocast leaves it alone
    return lambda readings: torch.einsum("...rc,rcd->...rd", taken(readings).double() - mean, zca).float()

def prompt(cfg, question, layers, slots=1):
    """The question, then an <act> token for each layer read of one thought, or one for each thought of a run. (The
    seed's has the question last.)"""
    seed = cfg.protocol == "seed"
    acts = "<act>" * (len(layers) if slots == 1 else slots)
    layer = f"Layer {', '.join(str(layer - seed) for layer in layers)}:"
    return f"{layer} {acts} {question}" if seed else f"{question} {layer}{acts}"

def injection(cfg, vectors, act):
    """One thought's readings (B, R, C), an <act> token each, where --inject-layers says; or those of all layers of all
    thoughts of a run (B, slots, L+1, C), an <act> token for each thought, each layer below the last where it was read:
    that is all that the answer sees of them. -> Injection."""
    whole = vectors.ndim == 4
    at = dict(enumerate(vectors.unbind(2)[:-1])) if whole else dict.fromkeys(cfg.into_layers, vectors)
    return Injection(at, act, cfg.scale)

def consult(run, model, prompts, vectors, said, last):
    """Hidden states (B, last, C) and the cache, after prompts with readings in them and the tokens said (B, T') so far.

    What comes before the first <act> is computed once for each different prompt (tiny's oracle step, 2 CPU cores: 55
    -> 41 ms); from there on all have the same tokens, at the same positions. (Where these depend on the length of the
    question, steps are learnt for each length: one oracle read 0.88 of them in the wordings of one, 0.97 in another's.)
    """
    text, device, number = run.text, said.device, {p: n for n, p in enumerate(dict.fromkeys(prompts))}
    ids = [text.ids(p) for p in number]
    heads, tail = [row[:row.index(text.act)] for row in ids], ids[0][ids[0].index(text.act):]
    valid = put(pad([(1,) * len(head) for head in heads], 0, left=True) == 1, device)
    begin = [[0 if text.seed else max(run.cfg.positions // 8 - len(head), 0)] for head in heads]
    nothing = Cache((None,) * len(model.h), None, put(begin, device))
    _, cache, _ = model(model.wte(put(pad(heads, text.eos, left=True), device)), nothing, valid=valid, last=1)
    of = put([number[p] for p in prompts], device)
    # index_select: the backward of x[of] sums in any order, so that runs differ (and is slower: 43 ms against 36)
    cache = cache.map(lambda x: x.index_select(0, of))._replace(valid=cache.valid[of], pos=cache.pos[of])
    act = put([at for at, i in enumerate(tail) if i == text.act], device)
    said = torch.cat([put([tail], device).expand(len(said), -1), said], dim=1)
    h, cache, _ = model(model.wte(said), cache, inject=injection(run.cfg, vectors, act), last=last)
    return h, cache

def oracle_loss(run, model, prompts, targets, vectors, rows=ALL, most=None):
    """Loss and exactness, as coconut_loss's, of these rows of a batch of prompts and targets, or of their first `most`
    tokens' part in it; vectors: theirs alone, as injection() takes them. Built from token ids, never from the length of
    strings."""
    ids = pad([(*run.text.ids(t), run.text.eos) for t in targets], IGNORE)
    target = put(ids[rows, :most], vectors.device)
    said = target[:, :-1].masked_fill(target[:, :-1] == IGNORE, run.text.eos)
    logits = model.logits(consult(run, model, prompts[rows], vectors, said, target.shape[1])[0])
    return token_loss(logits, target, int((ids != IGNORE).sum())), all_right(logits, target)

def show(vectors, view):
    """Readings (..., R, C) with zeros, which inject nothing, for the layers that are not in view."""
    return vectors * put(np.array([[r in view] for r in range(vectors.shape[-2])], dtype=np.float32), vectors.device)

def oracle_batches(run, coconut, split, purpose, size):
    """-> batch_at(step): rows and readings of fresh problems of one length, for both oracles in the same order.

    Gold labels ask about one thought: of its step, and in 2% of the rows of each other family (of what belongs to the
    whole problem the last thought is asked, as in the seed). Model labels ask about all thoughts of a run: half of the
    rows about a digit that a patch changed, which are the hard ones, the others about clean and patched runs alike. One
    phrasing a family and batch: fewer prompts.
    """
    cfg, text = run.cfg, run.text
    white = whitener(run, coconut, cfg.whiten)
    families = list(text.task.families)[:None if cfg.families == "all" else int(cfg.families)]
    shares = [1 - 0.02 * (len(families) - 1)] + [0.02] * (len(families) - 1)
    lengths = np.array([0.5 ** (max(cfg.digits) - d) for d in cfg.digits])  # short problems are learnt sooner
    @lru_cache(maxsize=1)
    def pool_at(refill):
        rng = rng_of(cfg.seed, purpose, "pool", refill)
        patch = rng if cfg.labels != "gold" else None
        return [think_about(run, coconut, text.task.draw(rng, split, d, 512), patch) for d in cfg.digits]
    @lru_cache(maxsize=1)  # for all parts of a batch
    def batch_at(step):
        rng = rng_of(cfg.seed, purpose, step)
        length = rng.choice(len(lengths), p=lengths / lengths.sum())
        runs = pool_at(step // (32 * len(cfg.kinds)))[length]
        D = cfg.digits[length]
        if cfg.kinds[step % len(cfg.kinds)] == "model":
            clean, patched = runs
            cells = rng.integers((512, D), size=(size, 2))
            changed = np.argwhere(clean.wrote != patched.wrote)
            family = str(rng.choice(list(MODEL_QUESTIONS), p=(0.9, 0.1)))
            which = rng.integers(2, size=size)  # 0: clean, 1: patched
            if len(changed) and family == "written":
                cells[::2], which[::2] = rng.choice(changed, size=len(cells[::2])), 1
            asked = str(rng.choice(TRAINED[family]))
            layers = range(len(coconut.h))
            prompts = [prompt(cfg, asked.replace("#", str(column)), layers, D + 1) for column in cells[:, 1]]
            targets = [model_says(runs[of], *cell, family) for of, cell in zip(which, cells)]
            of_clean, of_patched = (r.readings[put(cells[:, 0], cfg.device)] for r in runs)
            vectors = of_patched.where(put(which == 1, cfg.device)[:, None, None, None], of_clean)
        else:
            clean = runs if cfg.labels == "gold" else runs[0]
            index = rng.integers(512, size=size)
            asked = rng.choice(families, size=size, p=shares)
            slot = text.task.asked(rng, clean.pairs[index])
            slot[np.isin(asked, OF_PROBLEM)] = D
            one = {family: prompt(cfg, str(rng.choice(TRAINED[family])), cfg.layers) for family in families}
            prompts, pairs = [one[family] for family in asked], clean.pairs[index].tolist()
            targets = [text_says(text, *pair, *of) for pair, of in zip(pairs, zip(slot, asked))]
            # Of several layers, every other batch shows one alone: the oracle learns to do with each.
            view = list(cfg.views.values())[-1 if rng.random() < 0.5 else rng.integers(len(cfg.views))]
            vectors = show(white(clean.readings[put(index, cfg.device), put(slot, cfg.device)]), view)
        return prompts, targets, vectors
    return batch_at

def train_oracle(run, name="oracle"):
    """Self-oracle: the Coconut model, fine-tuned to read the thoughts of its frozen former self. LoRA oracle: a
    separate, frozen base model (from scratch: the stage-0 model) with adapters, on the same data."""
    cfg, lora = run.cfg, name == "lora"
    coconut = load_model(run, "coconut")
    model = load_model(run, "base" if lora else "coconut")
    if lora:
        add_lora(model, cfg.lora_rank)
    batch_at = oracle_batches(run, coconut, TRAIN, "oracle", cfg.batch_size)
    def loss_of(step, rows):
        prompts, targets, vectors = batch_at(step)
        # Operands come first and are learnt last: three steps of four go no further than half of the longest step
        # (tiny, 2 cores, 600 steps: 33 -> 28 s, 0.71 of the steps read as before).
        most = max(1, run.text.step_tokens // 2) if step // len(cfg.kinds) % 4 else None
        loss, exact = oracle_loss(run, model, prompts, targets, vectors[rows], rows, most)
        rng = rng_of(cfg.seed, "which rehearsal", step)
        size = math.ceil(cfg.batch_size / 4)
        if rng.random() < cfg.rehearsal and not lora and (rows.start or 0) < size:
            # All thoughts, a quarter of a batch: after text alone (as in the seed) none of 1000 held-out problems was
            # still solved in thoughts. Added to the oracle's loss, since every step of Muon is as large as any other.
            loss = loss + coconut_step(run, model, step, cfg.last, "rehearsal", size, rows=rows)[0]
        return loss, exact
    steps, *rates = cfg.train_lora if lora else cfg.train_oracle
    fit(run, name, model, (steps * len(cfg.kinds), *rates), loss_of)
    weights = {key: w for key, w in model.state_dict().items() if not lora or ".lora_" in key}
    save_part(run, name, weights)

def ask(run, oracle, vectors, question):
    """The oracle's greedy answers to one question about readings, as injection() takes them; zeros inject nothing."""
    cfg, text, answers = run.cfg, run.text, []
    about = (range(len(oracle.h)), vectors.shape[1]) if vectors.ndim == 4 else (cfg.layers,)
    asked = prompt(cfg, question, *about)
    # The seed's oracle never learnt to begin its answer, and is asked for it so (scripts/10, evaluate).
    short = question == SEED_QUESTIONS["answer"]
    hold = (text.seed * (2 if short else 3), (text.eos, text.bot, text.sep, text.eot, text.act))
    most = max(25, text.step_tokens + 1, *text.answer_tokens.values())
    for chunk in vectors.split(1024):
        n = len(chunk)
        with torch.no_grad(), amp(cfg, oracle):
            nothing = torch.empty(n, 0, dtype=torch.long, device=cfg.device)
            h, cache = consult(run, oracle, [asked] * n, chunk, nothing, last=1)
            written, _, _ = write(oracle, h, cache, text.eos, limit=10 if text.seed and short else most, hold=hold)
        answers += [text.show(row) for row in written.tolist()]
    if text.seed:
        answers = [(re.search(r"\d+", s) or [""])[0] if short else s.strip() for s in answers]
    return answers

# -----------------------------------------------------------------------------------------------------------
# 10. Probes: what a classifier of one or two layers finds in the same readings
PROBES = {"linear": 0, "mlp": 512}  # name: width of the hidden layer
PROBED = {"a": 10, "b": 10, "carry": 2, "digit": 10, "step": 200}  # name: classes; step: both operands and carry-in

def new_probe(run, view, hidden):
    """Linear (hidden = 0) or one-hidden-layer classifiers of the layers in view, side by side."""
    torch.manual_seed(run.cfg.seed)
    width = SIZES[run.cfg.model][2] * len(view)
    body = [nn.Linear(width, hidden), nn.GELU()] if hidden else []
    return nn.Sequential(*body, nn.Linear(hidden or width, sum(PROBED.values()))).to(run.cfg.device)

def probe_data(run, model, white, problems):
    """-> readings (N, R, C) and labels (N, 5), final slots left out: they have no operands."""
    x, y = [], []
    for pairs in problems:
        cols = [columns(a, b)[:-1] for a, b in pairs.tolist()]
        x.append(white(think_about(run, model, pairs).readings[:, :-1]).flatten(0, 1))
        y += [(da, db, carry, digit, (da * 10 + db) * 2 + carry) for each in cols for da, db, carry, digit, _ in each]
    return torch.cat(x), torch.tensor(y, device=run.cfg.device)

def probe_says(probe, x):
    """Readings (N, R', C) -> (N, 5) int array: the most likely class of each label."""
    with torch.no_grad():
        parts = probe(x.flatten(1)).split(list(PROBED.values()), 1)
    return torch.stack([part.argmax(-1) for part in parts], dim=1).cpu().numpy()

def load_probes(run, white, name, view):
    """The probes of a view -> {kind: function of readings (N, L+1, C), as probe_says}."""
    def load(kind, hidden):
        probe = new_probe(run, view, hidden)
        weights = read_safetensors(run.out / "probes.safetensors")
        probe.load_state_dict({key: weights[f"{kind}.{name}.{key}"] for key in probe.state_dict()})
        return lambda readings: probe_says(probe, white(readings)[:, view])
    return {kind: load(kind, hidden) for kind, hidden in PROBES.items()}

def train_probes(run):
    """Linear and one-hidden-layer probes of each view of the layers read, measured once on the test split."""
    cfg, coconut = run.cfg, load_model(run, "coconut")
    white = whitener(run, coconut)
    train = chunks(run.text.task.draw(rng_of(cfg.seed, "probes", d), TRAIN, d, cfg.probe_problems)
                   for d in cfg.digits)
    (x, y), test = (probe_data(run, coconut, white, problems) for problems in (train, test_problems(run)))
    weights, scores, steps = {}, {}, defaultdict(dict)
    for (kind, hidden), (name, view) in itertools.product(PROBES.items(), cfg.views.items()):
        probe = new_probe(run, view, hidden)
        def loss_of(step, rows):
            i = put(rng_of(cfg.seed, "probe", step).integers(len(x), size=512)[rows], cfg.device)
            shown = x[i].index_select(1, put(view, cfg.device)).flatten(1)
            parts = probe(shown)[:, None].split(list(PROBED.values()), 2)
            loss = sum(token_loss(part, y[i, n:n + 1], 512) for n, part in enumerate(parts))
            return loss, all_right(parts[-1], y[i, -1:])
        fit(run, f"{kind} {name}", probe, cfg.train_probes, loss_of)
        hits = probe_says(probe, test[0][:, view]) == test[1].cpu().numpy()
        scores[kind] = {label: rate(hits[:, n]) for n, label in enumerate(PROBED)}  # the last view, all layers, stays
        steps[kind][name] = scores[kind]["step"]
        weights.update({f"{kind}.{name}.{key}": p for key, p in probe.state_dict().items()})
    record(run, probes={**scores, "step_by_layer": steps})
    save_part(run, "probes", weights)

# -----------------------------------------------------------------------------------------------------------
# 11. Evaluation: rates with their intervals, controls, the report
def rate(hits):
    """Array of bool -> {"exact", "n", "ci95"}: a share in [0, 1] (or None) with its Wilson 95% interval (1927)."""
    n = len(hits)
    z = 1.959964  # of the normal distribution: 95% lie within
    if not n:
        return {"exact": None, "n": 0, "ci95": [0.0, 1.0]}
    p = float(np.mean(hits))
    middle = p + z * z / (2 * n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    low, high = ((middle + sign * half) / (1 + z * z / n) for sign in (-1, 1))
    return {"exact": p, "n": n, "ci95": [max(0.0, min(p, low)), min(1.0, max(p, high))]}  # p: against rounding

def show_rate(r):
    return f"{r['exact']:.3f} [{r['ci95'][0]:.3f}, {r['ci95'][1]:.3f}] n={r['n']}" if r["n"] else "n=0"

def test_problems(run):
    """The held-out problems of every evaluation, distinct, in batches (<= 250, 2) of one length and number of steps."""
    cfg, task, groups = run.cfg, run.text.task, []
    n = max(2, math.ceil(cfg.eval_problems / len(cfg.digits)))  # the controls need another problem
    for d in cfg.digits:
        pairs = task.draw(rng_of(cfg.seed, "test", d), TEST, d, n, distinct=True)
        steps = np.array([len(task.steps(a, b)) for a, b in pairs.tolist()])
        groups += [pairs[steps == count] for count in np.unique(steps)]
    return chunks(groups)

def coconut_scores(run, model, k):
    """Held-out exact match at stage k, autoregressive from the problem alone -> R, with by_digits beside it, and
    teacher_forced: gold text steps and answer prefix given, as others report it."""
    cfg, task, by_digits, forced = run.cfg, run.text.task, {}, []
    for pairs in test_problems(run):
        digits = task.length(pairs[0, 0])
        text_slots, thoughts = plan(cfg, run.text, pairs, k)
        with torch.no_grad(), amp(cfg, model):
            answers = answer(run.text, model, ponder(cfg, run.text, model, pairs, k)[0], digits)
            batch = make_batch(run.text, pairs, text_slots, cfg.device)
            forced += coconut_loss(model, batch, thoughts)[1].tolist()
        by_digits.setdefault(str(digits), []).extend(
            said == task.answer(a, b) for said, (a, b) in zip(answers, pairs.tolist()))
    return {**rate(sum(by_digits.values(), [])), "teacher_forced": rate(forced),
            "by_digits": {digits: rate(hits) for digits, hits in by_digits.items()}}

def score_steps(text, said, where):
    """Steps said about readings of `where`, a list of (a, b, slot) -> S (see the README).

    operands: both digits and the carry-in right; result: digit and carry-out right (both without the final slot, which
    has neither); token_f1: of the sets of white-space-separated words, as the seed counts it.
    """
    gold, final = [text.task.steps(a, b)[slot] for a, b, slot in where], np.array([text.task.final(*x) for x in where])
    exact = np.array([s == g for s, g in zip(said, gold)])
    operands = np.array([s.partition("=")[0] == g.partition("=")[0] for s, g in zip(said, gold)])
    result = np.array([s.partition(" write ")[2] == g.partition(" write ")[2] for s, g in zip(said, gold)])
    words = [(set(s.split()), set(g.split())) for s, g in zip(said, gold)]
    f1 = [2 * len(s & g) / (len(s) + len(g)) if s or g else 1.0 for s, g in words]
    inner = rate(exact[~final])
    return {**rate(exact), **({} if text.task.items else {
                "operands": float(operands[~final].mean()), "result": float(result[~final].mean())}),
            "token_f1": float(np.mean(f1)), "exact_no_final": inner["exact"], "n_no_final": inner["n"],
            "ci95_no_final": inner["ci95"]}

def no_final(s):
    """S -> R without the final slots: what probes, which leave these out, are compared with."""
    return {"exact": s["exact_no_final"], "n": s["n_no_final"], "ci95": s["ci95_no_final"]}

def flat(runs, white, change=lambda vectors: vectors):
    """-> changed readings of every slot of every problem (N, R, C), and what each should be of: a list (a, b, slot)."""
    vectors = torch.cat([change(white(r.readings)).flatten(0, 1) for r in runs])
    return vectors, [(a, b, slot) for r in runs for a, b in r.pairs.tolist() for slot in range(r.readings.shape[1])]

def majorities(run):
    """The most frequent training step, for "all" and each (number of digits, slot): baselines that read nothing."""
    seen, task = defaultdict(Counter), run.text.task
    for d in run.cfg.digits:
        for a, b in task.draw(rng_of(run.cfg.seed, "majority", d), TRAIN, d, 5000).tolist():
            for slot, step in enumerate(task.steps(a, b)):
                seen[d, slot][step] += bool(step)  # not the empty ones, which are left out of what is compared
                seen["all"][step] += bool(step)
    return {key: steps.most_common(1)[0][0] for key, steps in seen.items()}

def control_scores(run, oracle, runs, white, others):
    """Step scores with the wrong reading or none, and of baselines that read nothing -> {name: S}.

    shuffled: another problem's, another slot's; shuffled_same_slot: another problem's; wrong_slot: another slot's;
    others: name -> another Run and model, whose readings of the same problems are shown.
    """
    rng = rng_of(run.cfg.seed, "controls")
    changes = {"none": torch.zeros_like, "random": lambda v: torch.from_numpy(rng.standard_normal(v.shape)).to(v),
               "shuffled": lambda v: v.roll((1, 1), (0, 1)), "shuffled_same_slot": lambda v: v.roll(1, 0),
               "wrong_slot": lambda v: v.roll(1, 1)}
    vectors = {kind: flat(runs, white, change)[0] for kind, change in changes.items()}
    for kind, (other, model) in others.items():
        theirs = [think_about(other, model, r.pairs) for r in runs]
        vectors[kind] = flat(theirs, whitener(other, model, other.cfg.whiten))[0]
    said = {kind: ask(run, oracle, v, run.text.questions["step"]) for kind, v in vectors.items()}
    _, where = flat(runs, white)
    most = majorities(run)
    said["constant"] = [most["all"]] * len(where)
    said["slot_majority"] = [most[run.text.task.length(a), slot] for a, _, slot in where]
    return {kind: score_steps(run.text, steps, where) for kind, steps in said.items()}

def oracle_scores(run, oracle, runs, white):
    """All families of gold labels in their held-out phrasing -> the oracle's section of results.json."""
    text, (vectors, where) = run.text, flat(runs, white)
    slots = np.array([slot for _, _, slot in where])
    last = np.flatnonzero(np.append(slots[1:], 0) == 0)
    scores = {}
    for family in [family for family in QUESTIONS if family in text.questions]:
        index = last if family in OF_PROBLEM else np.arange(len(where))
        truth = [text_says(text, *where[i], family) for i in index]
        said = ask(run, oracle, vectors[torch.from_numpy(index)], text.questions[family])
        right = np.array([s == t for s, t in zip(said, truth)])
        scores[family] = rate(right)
        if family == "step":
            scores["step"] = score_steps(text, said, where)
            scores["by_slot"] = {str(s): rate(right[slots == s]) for s in np.unique(slots)}
            scores["mistakes"] = [{"problem": text.task.problem(*where[i][:2]), "slot": where[i][2], "step": truth[i],
                                   "read": said[i]} for i in np.flatnonzero(~right)[:5]]
            if not text.seed and not text.task.items:
                form = r"(\d)\+(\d)(\+1)?=\d+ write (\d)( carry 1)?"
                named = [re.fullmatch(form, s) for s in said]
                scores["by_field"] = by_field([(*m.group(1, 2), int(bool(m[3])), m[4]) if m else (-1,) * 4
                                               for m in named], where)
    return scores

def by_field(found, where):
    """Rows (a, b, carry, digit, ...) found in readings of `where` -> {slot: {field: R}}, but for final slots."""
    inner = np.array([slot < len(str(a)) for a, _, slot in where])
    slots, truth = (np.array(x)[inner] for x in zip(*[(slot, columns(a, b)[slot][:4]) for a, b, slot in where]))
    hits = np.array(found)[inner, :4].astype(int) == truth
    return {str(s): {field: rate(hits[slots == s, n]) for n, field in enumerate(("a", "b", "carry", "digit"))}
            for s in np.unique(slots)}

def lens_scores(run, model, runs):
    """Logit lens (nostalgebraist 2020) -> {layer: {"a", "b", "digit", "step" (all three)}}: how often these digits are
    among a reading's 5 most likely tokens, and as NAME_shuffled among another problem's, same slot."""
    scores, tokens = defaultdict(dict), np.array([run.text.ids(str(d))[0] for d in range(10)])
    for kind, shift in (("", 0), ("_shuffled", 1)):
        vectors, where = flat(runs, whitener(run, model, False), lambda v: v.roll(shift, 0))
        with torch.no_grad():
            top = model.logits(model.ln_f(vectors)).topk(5).indices.cpu().numpy()  # (N, R, 5)
        inner = [i for i, (a, _, slot) in enumerate(where) if slot < len(str(a))]
        digits = np.array([columns(a, b)[slot] for a, b, slot in where])[inner][:, [0, 1, 3]]  # (N', 3)
        found = (top[inner][:, :, None] == tokens[digits][:, None, :, None]).any(-1)  # (N', R, 3)
        for layer, hit in zip(run.cfg.layers, found.swapaxes(0, 1)):
            named = zip(("a", "b", "digit", "step"), (*hit.T, hit.all(1)))
            scores[str(layer)] |= {name + kind: rate(h) for name, h in named}
    return scores

def faithfulness(run, oracle, probes, tested, shown, families):
    """How often what is read of a column is what the model then wrote there -> {reader: {name: R}}.

    gold: the digit of the step that the oracle reads in the column's own slot, from shown(readings); linear, mlp: the
    probes' digit there; MODEL_QUESTIONS: what the oracle says of all thoughts. clean, patched: in the runs of `tested`,
    pairs of Runs; changed: digits that the patch changed; wrong: wrong digits of clean runs.
    """
    hits = defaultdict(list)
    cases = ("clean", "wrong", "patched", "changed")
    for clean, patched in tested:
        right = digits_of([str(a + b) for a, b in clean.pairs.tolist()], clean.wrote.shape[1])
        both = ((clean, right, *cases[:2]), (patched, clean.wrote, *cases[2:]))
        for c, (runs, other, every, special) in itertools.product(range(right.shape[1]), both):
            steps = ask(run, oracle, shown(runs.readings[:, c]), HELD_OUT["step"])
            digits = np.array([(re.search(r"write (\d)", step) or " ?")[1] for step in steps])
            read = {"gold": digits == runs.wrote[:, c]}
            for kind, probe in probes.items():
                read[kind] = probe(runs.readings[:, c])[:, 3].astype(str) == runs.wrote[:, c]
            for family in families:
                said = ask(run, oracle, runs.readings, HELD_OUT[family].replace("#", str(c)))
                read[family] = np.array([s == model_says(runs, i, c, family) for i, s in enumerate(said)])
            for reader, hit in read.items():
                hits[reader, every] += hit.tolist()
                hits[reader, special] += hit[runs.wrote[:, c] != other[:, c]].tolist()
    return {reader: {case: rate(hits[reader, case]) for case in cases} for reader in read}

def readers(run):
    """-> coconut, oracle, function that whitens readings, MLP probe of them (or None): what look() takes."""
    coconut, oracle = (load_model(run, name) for name in ("coconut", "oracle"))
    probe = None
    white = whitener(run, coconut, run.cfg.whiten)
    if not run.cfg.data and run.cfg.protocol == "own":
        whitened = white if run.cfg.whiten else whitener(run, coconut)
        probe = load_probes(run, whitened, *[*run.cfg.views.items()][-1])["mlp"]
    return coconut, oracle, white, probe

@torch.no_grad()
def look(run, models, pairs):
    """Problems (n, 2) of one length thought by thought, as --stage ask and the report show them -> a list of dicts.

    with_another: the answer when this thought is that of the problem before.
    """
    cfg, text, (coconut, oracle, white, probe) = run.cfg, run.text, models
    D, every = text.task.length(pairs[0, 0]), cfg.thoughts_per_slot
    with amp(cfg, coconut):
        cache, read = ponder(cfg, text, coconut, pairs, cfg.last, read=range(len(coconut.h) + 1))
        donor = cache.map(lambda x: x.roll(1, 0))
        answers, *others = (answer(text, coconut, exchange(cache, donor, thoughts_of(cfg, D, slot)), D)
                            for slot in (-1, *range(D + 1)))
    readings = read[:, every - 1::every].float()
    said = np.reshape(ask(run, oracle, white(readings).flatten(0, 1), text.questions["step"]), (-1, D + 1)).tolist()
    top = coconut.logits(coconut.ln_f(readings[:, :, cfg.layers[-1]])).topk(5).indices.tolist()
    probed = [probe(x).tolist() + [None] if probe else [None] * (D + 1) for x in readings[:, :-1]]
    found = []
    for i, pair in enumerate(pairs.tolist()):
        thoughts = [{"step": step, "oracle": said[i][slot], "probe": p and dict(zip(PROBED, p)),
                     "lens": [text.show([token]) for token in top[i][slot]], "with_another": others[slot][i]}
                    for slot, (step, p) in enumerate(zip(text.task.steps(*pair), probed[i]))]
        found.append({"problem": text.task.problem(*pair), "answer": answers[i],
                      "right": answers[i] == text.task.answer(*pair), "thoughts": thoughts})
    return found

def causal_scores(run, model):
    """What the answer does when thoughts are exchanged: their keys and values, which is all that it sees of them.

    keep: answers that stay as they were with all thoughts (and by_slot, with one) replaced by the mean thought of their
    slot, another problem's (swap), or noise of the same norm. interchange: with all of another problem's, whose answer
    is it? map: slot x column, of the digits in which the two answers differ, the share that becomes the other's.
    """
    cfg, hits = run.cfg, defaultdict(list)
    generator = torch.Generator(cfg.device).manual_seed(cfg.seed)
    changes = {"mean": lambda x: x.mean(0, keepdim=True), "swap": lambda x: x.roll(1, 0),
               "noise": lambda x: F.normalize(torch.randn(x.shape, generator=generator, device=x.device), dim=-1).to(x)
               * x.norm(dim=-1, keepdim=True)}
    for pairs in test_problems(run):
        D = run.text.task.length(pairs[0, 0])
        cache, _ = ponder(cfg, run.text, model, pairs, cfg.last)
        own = np.array(answer(run.text, model, cache, D))
        other = np.roll(own, 1)
        for kind, change in changes.items():
            donor = cache.map(change)
            for slot in (*range(D + 1), "all"):
                at = thoughts_of(cfg, D, 0 if slot == "all" else slot)
                said = np.array(answer(run.text, model, exchange(cache, donor, at | (slot == "all")), D))
                hits["keep", kind, slot] += (said == own).tolist()
                if (kind, slot) == ("swap", "all"):
                    b, a = said == other, said == own
                    for name, whose in (("b", b), ("a", a), ("neither", ~(a | b))):
                        hits["interchange", name] += whose[own != other].tolist()
                elif kind == "swap" and not cfg.data:
                    a, b, now = (digits_of(texts, D) for texts in (own, other, said))
                    for c in range(D):
                        hits["map", D, slot, c] += (now == b)[:, c][(a != b)[:, c]].tolist()
    slots = range(max(cfg.digits) + 1)
    return {"keep": {kind: rate(hits["keep", kind, "all"]) for kind in changes},
            "keep_by_slot": {kind: {str(slot): rate(hits["keep", kind, slot]) for slot in slots} for kind in changes},
            "interchange": {name: rate(hits["interchange", name]) for name in ("b", "a", "neither")},
            "map": {str(D): [[rate(hits["map", D, slot, c])["exact"] for c in range(D)] for slot in range(D + 1)]
                    for D in cfg.digits if not cfg.data}}

def digit_scores(run, coconut, oracle, tested, white):
    """What oracle, probes and lens find of a thought's digits -> for "probes"; and by layers read: faithfulness()."""
    runs, layers, whitened = [clean for clean, _ in tested], {}, whitener(run, coconut)
    for name, view in run.cfg.views.items():
        probes = load_probes(run, whitened, name, view)
        def shown(readings):
            return show(white(readings), view)
        vectors, where = flat(runs, shown)
        of_all = MODEL_QUESTIONS if len(view) == len(run.cfg.layers) and run.cfg.labels != "gold" else ()
        found = faithfulness(run, oracle, probes, tested, shown, of_all)
        found["gold"]["step"] = no_final(score_steps(run.text, ask(run, oracle, vectors, HELD_OUT["step"]), where))
        for kind, steps in load_json(run.out / "results.json")["probes"]["step_by_layer"].items():
            found[kind]["step"] = steps[name]
        layers[name] = found
    fields = {kind: by_field(np.concatenate([probe(r.readings.flatten(0, 1)) for r in runs]), where)
              for kind, probe in probes.items()}
    return {"lens": lens_scores(run, coconut, runs), "by_field": fields}, layers

def evaluate(run):
    """Everything that is measured on the test split -> results.json."""
    cfg, last, own = run.cfg, run.cfg.last, run.cfg.protocol == "own"
    models, problems = readers(run), test_problems(run)
    coconut, oracle, white, _ = models
    sums = own and not cfg.data
    rng = rng_of(cfg.seed, "patches") if sums else None
    tested = [think_about(run, coconut, pairs, rng) for pairs in problems]
    runs = [clean for clean, _ in tested] if sums else tested
    scores = coconut_scores(run, coconut, last)
    sections = {"coconut": {"stages": {"all": scores}, "by_digits": scores["by_digits"],
                            "teacher_forced": scores["teacher_forced"],
                            "no_thoughts": coconut_scores(run, coconut, None)},
                "oracle": oracle_scores(run, oracle, runs, white)}
    others = {}
    if own:
        others["untrained"] = run, new_model(run)
        if cfg.prior:
            theirs = parse(["--stage", "eval", "--out", cfg.prior]).thoughts
            prior = Run(dataclasses.replace(cfg, thoughts=theirs), run.text, Path(cfg.prior))
            others["prior"] = prior, load_model(prior, "coconut")
        lora = load_model(run, "lora")
        sections["lora"] = oracle_scores(run, lora, runs, white)
        sections["lora"]["controls"] = control_scores(run, lora, runs, white, {})
        batch_at = oracle_batches(run, coconut, VALIDATION, "validation", 256)
        for name, model in (("oracle", oracle), ("lora", lora)):
            with torch.no_grad(), amp(cfg, model):
                losses = [oracle_loss(run, model, *batch_at(i))[0].item() for i in range(10)]
            sections[name]["val_loss"] = float(np.mean(losses))
        sections["causal"] = causal_scores(run, coconut)
        if sums:
            sections["probes"], layers = digit_scores(run, coconut, oracle, tested, white)
            sections["layers"] = layers
            sections["causal"]["faithfulness"] = [*layers.values()][-1]
        firsts = [next(pairs for pairs in problems if run.text.task.length(pairs[0, 0]) == d) for d in cfg.digits]
        sections["examples"] = [x for pairs in firsts
                                for x in look(run, models, pairs[:math.ceil(20 / len(firsts))])]
    sections["controls"] = control_scores(run, oracle, runs, white, others)
    sections["oracle"]["coconut_after"] = coconut_scores(run, oracle, last)
    record(run, config=load_json(run.out / "config.json"), env=environment(cfg), **sections)

def environment(cfg):
    """Versions and hardware, for results.json."""
    ask = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    git = subprocess.run(ask, capture_output=True, text=True, check=False).stdout if shutil.which("git") else ""
    device = torch.cuda.get_device_name() if cfg.device == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    return {"torch": torch.__version__, "device": device, "git": git.strip()}

def tables(results):
    """The report: (title, names of the columns, {name of the row: cells}); a cell is an R, a share or None."""
    coconut, first = results["coconut"], results["oracle"]["step"]
    oracles = {name: results[key] for name, key in (("self-oracle", "oracle"), ("LoRA", "lora")) if key in results}
    yield "coconut, held-out problems", ("exact match", "teacher-forced"), {
        **{f"stage {name}": [r, r["teacher_forced"]["exact"]] for name, r in coconut["stages"].items()},
        **{f"all, {d} digits": [r, None] for d, r in coconut["by_digits"].items() if len(coconut["by_digits"]) > 1},
        "all, the answer asked for at once": [coconut["no_thoughts"], None],
        "all, after the oracle's training": [results["oracle"]["coconut_after"], None]}
    yield "reading one thought: its step", ("without final slot", "all slots", "operands", "result", "F1"), {
        name: [no_final(s), *(s.get(key) for key in ("exact", "operands", "result", "token_f1"))]
        for name, s in ({name: r["step"] for name, r in oracles.items()} | results["controls"]).items()}
    yield "other questions", oracles, {
        family: [r[family] for r in oracles.values()] for family in [*QUESTIONS][1:] if family in results["oracle"]}
    if "causal" in results:
        causal = results["causal"]
        yield "the answer, with all thoughts replaced", ("",), {
            **{f"{kind}: it stays the same": [r] for kind, r in causal["keep"].items()},
            "swap: it is the other problem's": [causal["interchange"]["b"]]}
    if "layers" not in results:
        return
    for D, grid in causal["map"].items():
        yield (f"{D} digits: become the other's, with its", [f"column {c}" for c in range(int(D))],
               {f"thought of slot {slot}": row for slot, row in enumerate(grid)})
    probes, named = results["probes"], ("a", "b", "carry", "digit", "step")
    yield f"probes, n={first['n_no_final']}", named, {
        **{f"{kind} probe": [probes[kind][name]["exact"] for name in named] for kind in PROBES},
        **{f"logit lens, layer {layer}, top 5{of.replace('_', ', ')}": [
            r[name + of]["exact"] if name != "carry" else None for name in named]
           for layer, r in probes["lens"].items() for of in ("", "_shuffled")}}
    yield "found in the thought of each slot", named[:4], {
        f"{reader}, slot {slot}": [row[name]["exact"] for name in named[:4]]
        for reader, rows in (("self-oracle", results["oracle"]["by_field"]), *probes["by_field"].items())
        for slot, row in rows.items()}
    cases = ("changed by the patch", "patched", "clean", "wrong", "step, no final")
    yield "the digit read is the digit written", cases, {
        f"layer {name}, {reader}": [r["changed"], *(r[case]["exact"] for case in ("patched", "clean", "wrong")),
                                    r["step"]["exact"] if "step" in r else None]
        for name, found in results["layers"].items() for reader, r in found.items()}

def print_table(title, names, rows):
    """rows: name -> cells; a cell is an R, a number, text, or None."""
    def shown(x):
        return {dict: show_rate, float: "{:.3f}".format, type(None): lambda _: "-"}.get(type(x), str)(x)
    widths = [max(len(shown(x)), len(name), 8) + 2 for name, x in zip(names, next(iter(rows.values())))]
    print(f"\n{title:<38}" + "".join(name.rjust(width) for name, width in zip(names, widths)))
    for name, cells in rows.items():
        print(f"  {name:<36}" + "".join(shown(x).rjust(width) for x, width in zip(cells, widths)))

def headline(results):
    """The result in two sentences, with its controls."""
    best, step, controls = results["coconut"]["stages"]["all"], results["oracle"]["step"], results["controls"]
    nothing = ", ".join(f"{controls[name]['exact_no_final']:.1%} {what}" for name, what in (
        ("shuffled_same_slot", "given another problem's thought of the same slot"), ("none", "given no thought"),
        ("slot_majority", "by always saying the slot's most frequent step")) if name in controls)
    return (f"With all steps latent, {best['exact']:.1%} of {best['n']} held-out problems are answered right. From one "
            f"thought the self-oracle reads {step['exact_no_final']:.1%} of {step['n_no_final']} steps word for word; "
            f"{nothing}.")

def report(run, results):
    """Print the tables, the first mistakes and the headline; write report.html."""
    for title, names, rows in tables(results):
        print_table(title, names, rows)
    print("\nfirst mistakes of the self-oracle")
    for m in results["oracle"]["mistakes"]:
        print(f"  {m['problem'] + ' slot ' + str(m['slot']):<24} is {m['step']:<26} read as {m['read']}")
    write_text(run.out / "report.html", page(run, results))
    print(f"\n{headline(results)}\n{results['seconds']['total']:.0f} s in all on {results['env']['device']}. Next:\n"
          f"  open {run.out / 'report.html'}")
    if not run.text.seed:
        print(f"  python cocoracle.py --stage ask --out {run.out}")
    if knobs(run.cfg) == knobs(Config()):
        print("  python cocoracle.py --bottleneck --labels all --out runs/bottleneck   # do the thoughts matter?")

STYLE = """:root { color-scheme: light dark; --line: light-dark(#ccc, #555); --dim: light-dark(#555, #aaa);
  --share: light-dark(#8ecae6, #1b6a8f); --wrong: light-dark(#b00020, #ff8a80) }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 75rem; margin: auto; padding: 1rem }
h1 + p { font-size: 1.2rem; max-width: 50rem } h2, h3 { margin: 2rem 0 .3rem; font-size: 1.1rem }
section { overflow-x: auto; margin-bottom: 1.5rem }
table { border-collapse: collapse; font: .85rem/1.4 ui-monospace, monospace }
th, td { padding: .15rem .6rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap }
th:first-child { white-space: normal } th:first-child, table.words * { text-align: left }
small, figcaption { color: var(--dim); font-size: .75rem }
td.share { background: color-mix(in srgb, var(--share) var(--p), transparent); print-color-adjust: exact }
.wrong { color: var(--wrong); font-weight: bold } svg { overflow: visible; stroke: currentColor; fill: none }
.curves { display: flex; flex-wrap: wrap; gap: 1.5rem } figure { margin: 0; width: 13rem }
td svg { display: block; width: 100%; height: 6px } pre { white-space: pre-wrap; overflow-wrap: anywhere }
@media (max-width: 40rem) { td small { display: block } th, td { padding: .15rem .3rem } }
@media print { section { break-inside: avoid } body { font-size: 11px } }"""

def html_table(title, names, rows):
    """As print_table(); a cell's colour is its share, its whisker the interval."""
    def cell(x):
        if x is None or isinstance(x, dict) and not x["n"]:
            return "<td>-"
        p, more = (x["exact"] if isinstance(x, dict) else x), ""
        if isinstance(x, dict):
            low, high = x["ci95"]
            more = (f" <small>[{low:.3f}, {high:.3f}] n={x['n']}</small><svg viewBox='0 0 100 6' preserveAspectRatio="
                    f"'none'><path d='M{100 * low:.1f} 3H{100 * high:.1f}M{100 * p:.1f} 0V6'/></svg>")
        return f"<td class=share style='--p:{100 * p:.0f}%'>{p:.3f}{more}"
    head = "".join(f"<th scope=col>{html.escape(name)}" for name in (title, *names))
    body = "".join(f"<tr><th scope=row>{html.escape(name)}{''.join(map(cell, cells))}" for name, cells in rows.items())
    return f"<section><table><thead><tr>{head}<tbody>{body}</table></section>"

def html_curve(part, lines):
    """Share right (solid) and loss (dashed, of its highest) of training batches over the steps of a part."""
    last, top = lines[-1], max(line["loss"] for line in lines) or 1
    exact, loss = (" ".join(f"{100 * line['step'] / line['steps']:.1f},{50 - 50 * line[key] / most:.1f}"
                            for line in lines) for key, most in (("exact", 1), ("loss", top)))
    return (f"<figure><svg viewBox='0 0 100 50' role=img aria-label='{part}'><path d='M0 0V50H100' stroke='gray'/>"
            f"<polyline points='{exact}'/><polyline points='{loss}' stroke-dasharray='2' stroke='gray'/></svg>"
            f"<figcaption><b>{part}</b>, {last['steps']} steps: right {last['exact']:.3f}, loss {last['loss']:.3f} "
            f"(highest {top:.2f})</figcaption></figure>")

def html_example(found):
    """A problem as look() gives it, thought by thought."""
    rows = "".join(
        f"<tr><td>{slot}<td>{html.escape(t['step'])}<td{' class=wrong' * (t['oracle'] != t['step'])}>"
        f"{'✗ ' * (t['oracle'] != t['step'])}{html.escape(t['oracle'])}<td>{probe_words(t)}"
        f"<td>{html.escape(' '.join(t['lens']))}<td>{html.escape(t['with_another'])}"
        for slot, t in enumerate(found["thoughts"]))
    mark = "✓ right" if found["right"] else "<span class=wrong>✗ wrong</span>"
    return (f"<section><h3>{html.escape(found['problem'])} = {html.escape(found['answer'])} {mark}</h3>"
            "<table class=words><tr><th>slot<th>step<th>the oracle reads<th>MLP probe<th>logit lens"
            f"<th>answer with another's thought{rows}</table></section>")

def page(run, results):
    """report.html: everything in results.json and log.jsonl that a person looks at, in one file that needs no other."""
    history = run.out / "log.jsonl"
    parts = defaultdict(dict)
    for line in map(json.loads, history.read_text().splitlines() if history.exists() else ()):
        part = parts[line["part"]]
        for step in [step for step in part if step >= line["step"]]:  # done again, after a resume or with --force
            del part[step]
        part[line["step"]] = line
    curves = "".join(html_curve(part, [*lines.values()]) for part, lines in parts.items())
    shown = sorted(results.get("examples", ()), key=lambda x: (
        x["right"], -sum(t["oracle"] != t["step"] for t in x["thoughts"])))
    command = shlex.join(["python", "cocoracle.py", "--stage", "eval" if run.text.seed else "all", "--out",
                          str(run.out), "--dtype", run.cfg.dtype, *changed_flags(run.cfg)])
    return f"""<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>
<title>cocoracle: {html.escape(str(run.out))}</title><style>{STYLE}</style><h1>cocoracle</h1>
<p>{html.escape(headline(results))}</p><p><small>{html.escape(results['env']['device'])}, PyTorch
{results['env']['torch']}, {results['seconds']['total']:.0f} s. Rates are shares of held-out problems or readings, with
Wilson 95% intervals; the more colour, the higher.</small></p>{"".join(html_table(*t) for t in tables(results))}
<h2>{len(shown)} held-out problems, thought by thought</h2><p><small>Drawn before they were answered; those with
mistakes stand first.</small></p>{"".join(map(html_example, shown))}<h2>Training</h2>
<p><small>Share of a training batch that is right (solid), loss (dashed).</small></p><div class=curves>{curves}</div>
<h2>Again</h2><pre>{html.escape(command)}</pre><pre>{html.escape(json.dumps(results['config']))}</pre></html>
"""

# -----------------------------------------------------------------------------------------------------------
# 12. Stages and command line
HELP = """347+285         a sum (with --data: the number of a problem): its answer and its thoughts
random          the same of a held-out problem
? 2 QUESTION    ask the oracle about the thought of slot 2, in your own words
swap 1 58+67    give the last problem the thought that 58+67 has in slot 1"""

def lines_of(prompt):
    """What is typed, with history, until Ctrl-D; Ctrl-C drops a line. Or the lines of a file."""
    if not sys.stdin.isatty():
        sys.stdin.reconfigure(errors="replace")
        yield from sys.stdin
        return
    import readline  # noqa: F401  gives input() a history
    print(HELP)
    while True:
        try:
            yield input(prompt)
        except KeyboardInterrupt:
            print()
        except EOFError:
            return print()

def responder(run):
    """-> function of a line, see HELP, that gives what it asks for (a dict) or raises UserError."""
    cfg, task, rng, last = run.cfg, run.text.task, np.random.default_rng(), None
    models = coconut, oracle, white, _ = readers(run)
    def respond(line):
        nonlocal last
        given, question = (re.fullmatch(form, line, re.ASCII) for form in (
            rf"(?:swap +(\d{{1,9}}) +)?{task.form}", r"\? *(\d{1,9}) +(.+)"))
        swap = given and given[1]
        slot = int(swap or question[1]) if swap or question else 0
        if (swap or question) and (not last or slot > task.length(last[0])):
            raise UserError(f"{line[:40]}: there is no such slot" if last else f"{line[:40]}: type a problem first")
        if question:
            if len(question[2]) > 100 or any(name in question[2] for name in RESERVED):
                raise UserError(f"{question[2][:40]}...: ask in at most 100 characters, without special tokens")
            vectors = white(think_about(run, coconut, np.array([last])).readings[0, slot])[None]
            return {"slot": slot, "question": question[2], "oracle": ask(run, oracle, vectors, question[2])[0]}
        if not given and line != "random":
            raise UserError(f"{line[:40]}: type {task.example}, or random, ? 2 QUESTION, swap 1 PROBLEM")
        pair = task.typed(*given.groups()[1:]) if given else task.draw(rng, TEST, int(rng.choice(cfg.digits)), 1)[0]
        if swap:
            of, into = (task.problem(*x) for x in (pair, last))
            if task.length(pair[0]) != task.length(last[0]):
                raise UserError(f"{line}: {of} is not of the length of {into}")
            found = look(run, models, np.array([last, pair]))[0]
            return {"slot": slot, "of": of, "in": into, "before": found["answer"],
                    "after": found["thoughts"][slot]["with_another"]}
        last = tuple(map(int, pair))
        return look(run, models, np.array([last, task.draw(rng, TEST, task.length(last[0]), 1)[0]]))[0]
    return respond

def watch(run):
    """--stage ask: problems and questions, a line each."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # at a prompt, only Ctrl-C means "not this line"
    respond = responder(run)
    errors = 0
    for line in filter(None, map(str.strip, lines_of("> "))):
        try:
            found = respond(line)
            print(json.dumps(found) if run.cfg.json else in_words(found), flush=True)
        except KeyboardInterrupt:
            if not sys.stdin.isatty():
                raise
        except UserError as e:
            errors += 1
            print(f"error: {e}", file=sys.stderr)
    if errors and not sys.stdin.isatty():
        raise UserError(f"{errors} of the lines were not understood: see above")

def probe_words(thought):
    return "{a}+{b}+{carry}".format(**thought["probe"]) if thought["probe"] else ""

def in_words(found):
    """What watch() found, for a terminal of 80 columns; what differs from the step is marked."""
    if "thoughts" not in found:
        return ", ".join(f"{name}: {value}" for name, value in found.items())
    red, plain = ("\033[31m", "\033[0m") if sys.stdout.isatty() and "NO_COLOR" not in os.environ else ("", "")
    rows = [f"{found['problem']} = {found['answer']}, {'right' if found['right'] else red + 'wrong' + plain}",
            f"{'slot':<5}{'step':<26}{'the oracle reads':<25}{'probe':<7}{'lens':<8}other's"]
    for slot, t in enumerate(found["thoughts"]):
        wrong = t["oracle"] != t["step"]
        rows.append(f"{slot:<5}{t['step'][:24]:<25}{red * wrong}{' !'[wrong]}{t['oracle'][:24]:<25}{plain * wrong}"
                    f"{probe_words(t):<7}{' '.join(map(str.strip, t['lens'][:3]))[:7]:<8}{t['with_another']}")
    return "\n".join(rows)

def seconds_of(device, call):
    """Median seconds of a warm call, of up to ten in 20 s, and how much longer the first one took: compiling."""
    times = []
    while len(times) < 3 or len(times) < 13 and sum(times) < 20:
        begin = time.perf_counter()
        call()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    median = float(np.median(times[min(3, len(times) - 2):]))
    return median, times[0] - median

def matrix_product(cfg):
    """FLOP/s of the machine's own matrix product: what MFU is a share of."""
    n = 8192 if cfg.device == "cuda" else 2048
    a, b = torch.randn(2, n, n, device=cfg.device, dtype=getattr(torch, cfg.dtype))
    return 2 * n**3 / seconds_of(cfg.device, lambda: a @ b)[0]

def work_of(model, call):
    """FLOPs of a call, counted from the shapes of its matrix products and attentions, and tokens through the model."""
    tokens = []
    hook = model.register_forward_pre_hook(lambda _, args: tokens.append(args[0].shape[:2].numel()))
    with torch.compiler.set_stance("force_eager"), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as f:
        call()
    hook.remove()
    model.zero_grad()
    return f.get_total_flops(), sum(tokens)

def bench(run):
    """Speed of every kind of step on the longest problems, beside the machine's own matrix product: a table, a line of
    JSON. MFU counts the model's FLOPs alone; seconds are of whole steps, data and optimizer included."""
    digits, results = max(run.cfg.digits), {}
    run = run._replace(cfg=dataclasses.replace(run.cfg, digits=(digits,)))
    cfg, text = run.cfg, run.text
    B, last = cfg.batch_size, cfg.last
    steps = itertools.count()
    peaks = [matrix_product(cfg)]
    model = new_model(run)
    batch_at = oracle_batches(run, model, TRAIN, "bench", B)
    pairs = text.task.draw(rng_of(cfg.seed, "bench"), VALIDATION, digits, B)
    def coconut(k):
        return lambda step, rows: coconut_step(run, model, step, k, "bench", B, rows=rows)
    def one_by_one(step, rows):  # as the seed trains
        return coconut_step(run, model, 16 * step + rows.start, last, "bench", 1)
    def oracle(step, rows):
        prompts, targets, vectors = batch_at(step % 32)
        return oracle_loss(run, model, prompts, targets, vectors[rows], rows)
    def answers():
        with torch.no_grad(), amp(cfg, model):
            answer(text, model, ponder(cfg, text, model, pairs, last)[0], digits)
    def training(loss_of, recipe, parts):
        optimizers = make_optimizers(model, *recipe[1:])
        def update():
            nonlocal parts
            _, parts = train_step(run, model, optimizers, loss_of, next(steps), parts)
        def gradients():
            for part in range(parts):
                with amp(cfg, model):
                    loss = loss_of(0, slice(part, None, parts))[0]
                loss.backward()
        return update, gradients
    parts = parts_of(run)
    for name, size, *how in (("text step", B, coconut(0), cfg.train_text, parts),
                             ("all-thoughts step", B, coconut(last), cfg.train_latent, parts),
                             ("one example at a time, 16 added up", 16, one_by_one, cfg.train_latent, 16),
                             ("oracle step", B, oracle, cfg.train_oracle, parts), ("answers", B)):
        call, counted = training(*how) if how else (answers, answers)
        if cfg.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        seconds, compiling = seconds_of(cfg.device, call)
        used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # of the process so far
        peaks.append(matrix_product(cfg))  # a machine's speed drifts: MFU is of the faster of before and after
        flops, tokens = work_of(model, counted)
        results[name] = {"examples_per_second": size / seconds, "tokens_per_second": tokens / seconds,
                         "seconds": seconds, "flops": flops, "mfu": flops / seconds / max(peaks[-2:]),
                         "memory_bytes": torch.cuda.max_memory_allocated() if cfg.device == "cuda" else used,
                         "compile_seconds": compiling if cfg.compile else None}
    batched, single = (results[name]["examples_per_second"] for name in [*results][1:3])
    told = {name: getattr(cfg, name) for name in ("model", "device", "dtype", "compile", "batch_size", "micro_batch")}
    told |= {"digits": digits, "thoughts": (digits + 1) * cfg.thoughts_per_slot,
             "env": environment(cfg), "peak_flops_per_second": peaks, "batched_over_single": batched / single}
    names = ("examples/s", "tokens/s", "seconds", "MFU", "GB", "compile s")
    print_table(f"matrix product {min(peaks) / 1e12:.3g} to {max(peaks) / 1e12:.3g} TFLOP/s", names, {
        name: (f"{r['examples_per_second']:.1f}", f"{r['tokens_per_second']:.0f}", r["seconds"], r["mfu"],
               r["memory_bytes"] / 1e9, r["compile_seconds"]) for name, r in results.items()})
    print(f"all thoughts, batched: {batched / single:.1f} times the examples/s of one at a time")
    print(json.dumps(told | {"steps": results}))

def export(run):
    """OUT/export/NAME of the coconut and each oracle, adapters merged, for transformers' from_pretrained."""
    cfg, text = run.cfg, run.text
    layers, heads, width = SIZES[cfg.model]
    config = {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "vocab_size": text.size, "n_layer": layers,
              "n_head": heads, "n_embd": width, "n_positions": cfg.positions, "activation_function": "gelu_new",
              "layer_norm_epsilon": 1e-5, "bos_token_id": text.eos, "eos_token_id": text.eos}
    bpe = released(cfg, gpt2_weights.BPE_FILES) if cfg.pretrained else None
    special = {name: text.ids(name)[0] for name in RESERVED}
    for name in ("coconut", "oracle", "lora"):
        if (run.out / f"{name}.safetensors").exists():
            model = load_model(run, name)
            weights = {key: w for key, w in model.state_dict().items() if ".lora_" not in key}
            for key, module in model.named_modules():
                if isinstance(module, Conv1D) and module.lora_scale:
                    weights[f"{key}.weight"] = module.weight + module.lora_a @ module.lora_b * module.lora_scale
            gpt2_weights.write_transformers(run.out / "export" / name, weights, config, bpe, text.pattern, special)
            print(f"exported {run.out / 'export' / name}")

TOOK = {"tiny": "about 5 minutes with the default settings on 2 cores of an AMD EPYC"}
PARTS = {"coconut": train_coconut, "probes": train_probes, "oracle": train_oracle,
         "lora": partial(train_oracle, name="lora"), "eval": evaluate}
NEEDS = {"probes": ("coconut",), "oracle": ("coconut",), "lora": ("coconut", "base"), "export": ("coconut",),
         "ask": ("coconut", "probes", "oracle"),
         "eval": ("coconut", "base", "probes", "oracle", "lora")}

def check(cfg, parts, world=1):
    """Refuse what cannot work before anything is written. Raises UserError."""
    out, own, slots = Path(cfg.out), cfg.protocol == "own", max(cfg.digits) + 1
    def done(part):
        return (out / f"{part}.safetensors").exists() or part == "base" and cfg.pretrained
    def refuse(condition, message):
        if condition:
            raise UserError(message)
    refuse(cfg.model == "tiny" and (cfg.pretrained or cfg.weights),
           "--model tiny has no released weights: choose --model gpt2, or leave --init and --weights out")
    refuse(cfg.weights and not cfg.pretrained, "--weights is not read with --init scratch: leave one of them out")
    refuse(own and (cfg.coconut or cfg.oracle),
           "--coconut and --oracle are for --protocol seed: use --out for a run of your own")
    refuse(not own and not (cfg.stage == "eval" and cfg.coconut and cfg.oracle and cfg.pretrained),
           "--protocol seed measures published checkpoints: it takes --stage eval, --coconut FILE.pt and --oracle "
           "FILE.pt, and not --init scratch")
    refuse(not own and done("coconut"), f"{out} holds a run of your own: choose another --out")
    refuse(not own and SIZES[cfg.model][0] < max(cfg.layers),
           f"--protocol seed reads layer {max(cfg.layers)}, --model {cfg.model} has fewer: use --model gpt2-large")
    refuse(max(cfg.into_layers) >= SIZES[cfg.model][0],
           "--inject-layers 1 is the output of the last block: choose shares below 1")
    refuse(cfg.prior and not (Path(cfg.prior) / "coconut.safetensors").exists(),
           f"--prior {cfg.prior} has no coconut.safetensors: name the directory of a finished run")
    refuse(cfg.device == "cuda" and not torch.cuda.is_available(),
           "--device cuda: torch finds no GPU: use --device cpu, or install a CUDA build of torch")
    longest = slots * max(13, cfg.thoughts_per_slot)  # 13: a step and <sep>
    refuse(not cfg.data and 4 * slots + longest > cfg.positions,
           f"{cfg.positions} positions do not hold {max(cfg.digits)} digits with {cfg.thoughts_per_slot} thoughts a "
           "slot: lower --digits or --thoughts-per-slot")
    refuse(world > 1 and cfg.stage in ("ask", "bench", "export"),
           f"--stage {cfg.stage} runs in one process: leave torchrun out")
    refuse(cfg.batch_size < world, f"--batch-size {cfg.batch_size} is too small for {world} processes: raise it")
    refuse(cfg.resume and cfg.force, "--resume keeps finished parts and --force trains them again: choose one")
    refuse(cfg.resume and not (out / "config.json").exists(),
           f"--resume: there is no run in {out}: leave --resume out to start one")
    refuse(cfg.data and cfg.stage == "probes", "--stage probes is for sums: leave it out with --data")
    skipped = ("probes",) if cfg.data else ()
    for need in [part for part in NEEDS.get(cfg.stage, ()) if own and part not in skipped]:
        refuse(not done(need), f"--stage {cfg.stage} needs {out / need}.safetensors: "
               f"run --stage {'coconut' if need == 'base' else need} --out {out} first")
    measured = load_json(out / "results.json")
    for part in ("coconut", "probes") if cfg.stage == "eval" and own else ():  # these are measured as they are trained
        refuse(part not in measured and part not in skipped,
               f"{out / 'results.json'} lacks the {part} part: restore it, or train with --force")
    found = [part for part in parts if done(part)] + ["last.pt"] * ("coconut" in parts and (out / "last.pt").exists())
    refuse(found and not cfg.resume and not cfg.force,
           f"{out} already has a run ({found and found[0]}): --resume goes on, --force trains it again, another --out "
           "keeps both")

def open_run(cfg, parts, rank, world):
    """Make the directory, clear what is to be trained again, write config.json -> Run. Raises UserError."""
    out = Path(cfg.out)
    task = read_problems(cfg.data) if cfg.data else Sums(cfg.digits, cfg.protocol == "seed")
    text = Text(read_bpe(released(cfg, gpt2_weights.BPE_FILES)) if cfg.pretrained else None, task)
    for n, (question, steps, said) in enumerate(task.items if "coconut" in parts else ()):
        asked, *sizes, answered = (len(text.ids(x)) for x in (question, *task.steps(n, 0), said))
        tokens = asked + answered + 4 + sum(max(size + 1, cfg.thoughts_per_slot) for size in sizes)
        tokens = max(tokens, max(answered, *sizes) + cfg.positions // 8 + 8)  # the oracle's question, and what it says
        if tokens > cfg.positions:
            raise UserError(f"--data {cfg.data}: problem {n} takes {tokens} tokens, {cfg.model} has {cfg.positions} "
                            "positions: leave it out")
    run = Run(cfg, text, out, rank, world)
    if rank or cfg.stage in ("ask", "bench"):
        return run
    if "coconut" in parts and cfg.pretrained:
        released_weights(cfg, text)  # refuses a wrong file before anything is written
    try:
        out.mkdir(parents=True, exist_ok=True)
        if cfg.resume and (out / "log.jsonl").exists():  # the last line may have been cut short
            write_text(out / "log.jsonl", "".join(re.findall(r".*\n", (out / "log.jsonl").read_text())))
        if not cfg.resume:
            names = [f"{part}.safetensors" for part in ("base", *PARTS)]
            names += ["last.pt", "results.json", "log.jsonl", "report.html"]
            for name in names if "coconut" in parts else [f"{part}.safetensors" for part in parts]:
                (out / name).unlink(missing_ok=True)
        write_text(out / "config.json", json.dumps(knobs(cfg), indent=1) + "\n")
    except OSError as e:
        raise UserError(f"--out {out} cannot be written ({e.strerror}): choose another directory") from e
    return run

def processes(device):
    """-> the number of this process and of all that torchrun started; each takes a GPU of its own. Plain sums of
    gradients join them: see train_step."""
    rank, local, world = (int(os.environ.get(*x)) for x in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1)))
    if world > 1:
        if device == "cuda":
            if local >= torch.cuda.device_count():
                raise UserError(f"there are {torch.cuda.device_count()} GPUs: lower --nproc_per_node")
            torch.cuda.set_device(local)
        torch.distributed.init_process_group("nccl" if device == "cuda" else "gloo", timeout=timedelta(hours=2))
    return rank, world

def main(argv=None):
    cfg = parse(argv)
    parts = [part for part in PARTS if not (cfg.data and part == "probes")] if cfg.stage == "all" else [cfg.stage]
    device = cfg.device if cfg.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    dtype = cfg.dtype if cfg.dtype != "auto" else "bfloat16" if device == "cuda" else "float32"
    cfg = dataclasses.replace(cfg, device=device, dtype=dtype,
                              compile=device == "cuda" if cfg.compile is None else cfg.compile)
    rank, world = processes(device)
    if not rank:
        check(cfg, parts, world)
    if rank:
        torch.distributed.barrier()  # until the first has fetched and written what the others read
    run = open_run(cfg, parts, rank, world)
    if world > 1 and not rank:
        torch.distributed.barrier()
    torch.set_float32_matmul_precision("high")
    size = sum(map(math.prod, shapes_of(cfg, run.text).values()))
    if not rank and not cfg.json:
        print(f"cocoracle {cfg.stage} | {cfg.model}, {size:,} parameters | {environment(cfg)['device']}, {cfg.dtype} | "
              f"{cfg.data or 'digits ' + ', '.join(map(str, cfg.digits))} | seed {cfg.seed} | {cfg.out}")
    if cfg.stage == "all" and not rank:
        print(f"{', '.join(parts)}: {TOOK.get(cfg.model, 'not timed yet')}; figures and report.html go to {cfg.out}")
    if cfg.stage in ("ask", "bench", "export"):
        return {"ask": watch, "bench": bench, "export": export}[cfg.stage](run)
    for part in parts:
        if world > 1:
            torch.distributed.barrier()  # until the first has written what the others read
        if not (run.out / f"{part}.safetensors").exists() and not (rank and part == "eval"):
            begin = time.time()
            PARTS[part](run)
            record(run, seconds={part: time.time() - begin})
    if "eval" in parts and not rank:
        seconds = load_json(run.out / "results.json")["seconds"]
        report(run, record(run, seconds={"total": sum(seconds[part] for part in PARTS if part in seconds)}))

def command_line(argv=None):
    """main(), with mistakes and interruptions told in one line. -> the exit code."""
    try:
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        main(argv)
    except (UserError, WeightsError) as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # nobody reads on
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as e:
        print(f"error: {e.filename or 'a file'} cannot be read or written ({e.strerror}): what was there before is "
              "whole; make room, or choose another --out", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted: training goes on from its last checkpoint with --resume (and without --force)",
              file=sys.stderr)
        return 130
    return 0

if __name__ == "__main__":
    sys.exit(command_line())
