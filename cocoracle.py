# /// script
# requires-python = ">=3.11"
# dependencies = ["torch>=2.9", "tiktoken", "numpy"]
# ///
"""cocoracle: can we read what a language model is thinking while it reasons in latent space?

A GPT-2 learns to add with a written, carry-by-carry chain of thought; a curriculum then replaces the written steps by
*continuous thoughts* (Coconut); and an *activation oracle* learns to read a thought's hidden state and to say in words
which step it stands for. Baselines and controls stand beside every figure.

    python cocoracle.py                                   # tiny model, from scratch, CPU, minutes
    python cocoracle.py --bottleneck                      # the answer sees the thoughts alone
    python cocoracle.py --stage eval --out runs/tiny      # measure a finished run again

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

It does not: sample (every answer is greedy), batch problems of different lengths, or train on text of your own.
"""

import argparse
import copy
import dataclasses
import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
import zlib
from collections import Counter, defaultdict
from contextlib import nullcontext
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tiktoken
import torch
import torch.nn as nn
import torch.nn.functional as F

import gpt2_weights
from gpt2_weights import WeightsError, read_bpe, read_pickle, read_safetensors, write_safetensors

# -----------------------------------------------------------------------------------------------------------
# 2. Configuration
STAGES = ("all", "coconut", "probes", "oracle", "lora", "eval", "export")
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
    return tuple(number(float, 0, 1)(x) for x in s.split(","))

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

COUNT, SHARE, LEARNING_RATE, AT_LEAST_0 = number(int, 1), number(float, 0, 1), number(float, 1e-12), number(float, 0)

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
    digits: tuple = opt((2, 3), "operand lengths, as `2,3` or `2-4`", type=digits_arg)
    thoughts_per_slot: int = opt(1, "thoughts in place of one text step", type=COUNT)
    thoughts: str = opt("hidden", "what a thought is fed: the last hidden state, or one learned vector (a control)",
                        choices=("hidden", "pause"))
    bottleneck: bool = opt(False, "a last stage in which the answer sees the thoughts alone, not the problem")
    protocol: str = opt("own", "seed: texts, layers and questions of syvb/cocoracle, to measure its published "
                        "checkpoints with --stage eval --coconut FILE --oracle FILE", choices=("own", "seed"))
    coconut: str = opt("", "the seed's checkpoint of the Coconut model (.pt)")
    oracle: str = opt("", "the seed's checkpoint of the self-oracle (.pt)")
    # coconut
    batch_size: int = opt(64, "problems (or readings) in a training step", type=COUNT)
    text_steps: int = opt(250, "training steps of stage 0, all text", type=COUNT)
    stage_steps: int = opt(90, "training steps of stage 1; stages 2, 3 take 2, 3 times as many", type=COUNT)
    latent_steps: int = opt(900, "training steps of the stage of all thoughts", type=COUNT)
    bottleneck_steps: int = opt(1000, "training steps of the stage that --bottleneck adds", type=COUNT)
    text_lr: float = opt(3e-3, "peak learning rate (AdamW) of the stages with text", type=LEARNING_RATE)
    text_muon: float = opt(0.02, "Muon's on their matrices; 0: AdamW on all", type=AT_LEAST_0)
    latent_lr: float = opt(2e-3, "peak learning rate (AdamW) without text", type=LEARNING_RATE)
    text_decay: float = opt(0.5, "AdamW's weight decay in the stages with text", type=AT_LEAST_0)
    latent_decay: float = opt(1.0, "AdamW's weight decay without text", type=AT_LEAST_0)
    bottleneck_decay: float = opt(0.3, "AdamW's weight decay behind the bottleneck", type=AT_LEAST_0)
    mix: float = opt(0.0, "share of all-text batches in the later stages, against forgetting", type=SHARE)
    # oracles
    read_layers: tuple = opt((0.5,), "layers read, as shares of the depth (rounded up), as `0,0.5`", type=shares_arg)
    whiten: bool = opt(True, "whiten readings before use")
    scale: float = opt(2.0, "strength of a reading, relative to the state it is added to", type=AT_LEAST_0)
    oracle_steps: int = opt(2200, "training steps of the self-oracle", type=COUNT)
    oracle_lr: float = opt(3e-3, "its peak learning rate (AdamW)", type=LEARNING_RATE)
    oracle_muon: float = opt(0.04, "Muon's on its matrices; 0: AdamW on all", type=AT_LEAST_0)
    rehearsal: float = opt(0.3, "share of its steps that repeat the coconut's own task too", type=SHARE)
    lora_steps: int = opt(450, "training steps of the LoRA oracle", type=COUNT)
    lora_lr: float = opt(3e-3, "its peak learning rate (AdamW)", type=LEARNING_RATE)
    lora_muon: float = opt(0.02, "Muon's on the adapters; 0: AdamW", type=AT_LEAST_0)
    lora_rank: int = opt(32, "rank of the adapters", type=COUNT)
    # evaluation
    probe_problems: int = opt(20000, "training problems of each length for the probes", type=COUNT)
    probe_epochs: int = opt(8, "passes of each probe over its readings", type=COUNT)
    eval_problems: int = opt(1000, "held-out problems in an evaluation, split evenly over --digits", type=COUNT)
    log_every: int = opt(100, "training steps between log lines", type=COUNT)
    save_every: float = opt(60.0, "seconds between checkpoints", type=AT_LEAST_0)

    @property
    def positions(self):
        return 256 if self.model == "tiny" else 1024

    @property
    def pretrained(self):
        return self.init == "pretrained" or self.init == "auto" and self.model != "tiny"

    @property
    def layers(self):
        """The layers read, lowest first. The seed's "Layer 18" is the output of block 18, counted from 0: layer 19."""
        depth = SIZES[self.model][0]
        return (19,) if self.protocol == "seed" else tuple(sorted({math.ceil(x * depth) for x in self.read_layers}))

    @property
    def inject_layer(self):
        """The layer before the highest one read (as the seed has it); readings of layers 0 and 1 enter at layer 0."""
        return max(max(self.layers) - 1, 0)

    @property
    def curriculum(self):
        """Stages in order: 0, then the last 1, 2, 3 slots latent, then all (as the number of latent slots); one more
        stands for all of them latent and the bottleneck."""
        most = max(self.digits) + 1
        return [k for k in (0, 1, 2, 3) if k < most] + [most] + [most + 1] * self.bottleneck

# What differs where weights are large or pretrained: from the field (Coconut: lr 1e-4, batch 128), untried by us.
LARGE = {"batch_size": 128, "text_lr": 1e-4, "latent_lr": 1e-4, "oracle_lr": 1e-4, "lora_lr": 1e-4, "text_muon": 0.0,
         "oracle_muon": 0.0, "lora_muon": 0.0, "text_decay": 0.01, "latent_decay": 0.01, "bottleneck_decay": 0.01,
         "text_steps": 2000, "stage_steps": 500, "latent_steps": 3000, "bottleneck_steps": 1500, "oracle_steps": 6000,
         "lora_steps": 6000}
# The seed's published checkpoints: of GPT-2-large, on sums of 2 to 4 digits, readings as they are.
SEED = {"model": "gpt2-large", "digits": (2, 3, 4), "whiten": False}
# What a later part may set for itself; everything else is as it was when the run's coconut was trained.
OWN = {"probes": ("probe_problems", "probe_epochs"),
       "oracle": ("oracle_steps", "oracle_lr", "oracle_muon", "rehearsal"),
       "lora": ("lora_steps", "lora_lr", "lora_muon", "lora_rank")}
ANYTIME = ("eval_problems", "log_every", "save_every", "weights")
SESSION = ("stage", "out", "resume", "force", "device", "dtype", "compile")  # not a property of the run

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
        note = "" if field.default in (None, "", False) else f" (default {field.default})"
        extra["help"] = field.metadata["help"] + note
        parser.add_argument("--" + field.name.replace("_", "-"), **field.metadata | extra)
    given = vars(parser.parse_args(argv))
    seed = given.get("protocol") == "seed"
    stage, out = given.get("stage", "all"), given.get("out") or f"runs/{'seed' if seed else given.get('model', 'tiny')}"
    if seed:
        base = SEED
    elif stage in ("all", "coconut") and not given.get("resume"):
        base = LARGE if given.get("model", "tiny") != "tiny" else {}
    else:
        base = {}
        for name, value in load_json(Path(out) / "config.json").items():  # through the parser: a file may be damaged
            flag = "--" + name.replace("_", "-")
            words = [flag, ",".join(map(str, value)) if isinstance(value, list) else str(value)]
            try:
                words = [flag if value else "--no-" + flag[2:]] if isinstance(value, bool) else words
                base |= vars(parser.parse_args(words))
            except UserError as e:
                raise UserError(f"{out}/config.json: {e}; restore it, or choose another --out") from None
        free = (*ANYTIME, *SESSION, *(() if given.get("resume") else OWN.get(stage, ())))
        for name in set(given) & set(base) - set(free):
            if given[name] != base[name]:
                raise UserError(f"--{name.replace('_', '-')} {given[name]}: the run in {out} has {base[name]}: "
                                "leave it out, or choose another --out")
    return Config(**{**base, **given, "out": out})

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
IGNORE = -100  # a target that is not trained on

def phrasings(nouns, places):
    """Every way to ask for one of the nouns in one of the places."""
    return [f"{opener} {noun}{place}{mark}" for opener, mark in (("What is", "?"), ("Which is", "?"), ("Write", "."))
            for noun in nouns for place in places]

# Question families of the activation oracle, and the phrasing of each that is kept for evaluation alone.
QUESTIONS = {
    "step": phrasings(("the intermediate calculation", "the calculation", "this calculation"),
                      (" at this reasoning step", " at this step", " of this step", "")),
    "answer": phrasings(("the final answer", "the answer", "the final result", "the result"),
                        (" to this problem", " of this problem", "")),
    "problem": phrasings(("the problem", "this problem"), (" being solved", " at this step", " of this step", "")),
}
HELD_OUT = {"step": "Which is the calculation of this step?", "answer": "Which is the final result of this problem?",
            "problem": "Which is the problem being solved?"}
SEED_QUESTIONS = {"step": "What is the intermediate calculation at this reasoning step?",
                  "answer": "What is the final answer?", "problem": "What problem is being solved?"}
TRAINED = {family: [q for q in asked if q != HELD_OUT[family]] for family, asked in QUESTIONS.items()}

def columns(a, b):
    """Add a + b by hand: one (digit of a, digit of b, carry in, digit written, carry out) per column, lowest first."""
    out, carry = [], 0
    for da, db in zip(reversed(str(a)), reversed(str(b))):
        total = int(da) + int(db) + carry
        out.append((int(da), int(db), carry, total % 10, total // 10))
        carry = out[-1][-1]
    return out

def column_text(da, db, carry_in, digit, carry_out):
    return (f"{da}+{db}" + "+1" * carry_in + f"={da + db + carry_in} write {digit}" + " carry 1" * carry_out)

def steps_of(a, b):
    """The D+1 steps of a + b as text; the last slot is the final carry, there or not."""
    cols = columns(a, b)
    return [column_text(*c) for c in cols] + ["carry 1 write 1" if cols[-1][-1] else "carry 0"]

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

def draw(rng, split, digits, n, distinct=False):
    """n problems of one length from one split -> (n, 2) int array; `distinct`: none twice (then maybe fewer)."""
    lo, hi = 10 ** (digits - 1), 10**digits
    pairs = rng.integers(lo, hi, size=(40 * n + 1000, 2))
    pairs = pairs[split_of(pairs[:, 0], pairs[:, 1]) == split]
    if distinct:
        pairs = pairs[np.sort(np.unique(pairs, axis=0, return_index=True)[1])]
    return pairs[:n]

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

    def __init__(self, ranks=None, seed=False):
        self.seed = seed
        if ranks is None:
            corpus = " ".join([q for asked in TRAINED.values() for q in asked] + ["Layer write carry"])
            words = sorted({w for word in re.findall(r"[A-Za-z]+", corpus) for w in (word, " " + word)})
            pieces = [bytes([i]) for i in range(256)] + [f" {d}".encode() for d in range(10)]
            ranks = {piece: i for i, piece in enumerate(pieces + [w.encode() for w in words if len(w) > 1])}
        names = ("<|endoftext|>", *SPECIAL)
        special = {name: len(ranks) + i for i, name in enumerate(names)}
        self.pattern = self.PATTERN.replace(r"\p{N}|", r"\p{N}+|") if seed else self.PATTERN
        self.enc = tiktoken.Encoding("cocoracle", pat_str=self.pattern, mergeable_ranks=ranks, special_tokens=special)
        self.eos, self.bot, self.sep, self.eot, self.act = (special[name] for name in names)
        self.size = self.enc.n_vocab
        self.ids = lru_cache(maxsize=4096)(lambda s: tuple(self.enc.encode(s, allowed_special="all")))

    def problem(self, a, b):
        return f"{a} + {b} =" if self.seed else f"{a}+{b}"

    def steps(self, a, b):
        """The steps that thoughts stand for. The seed has none for a final carry of 0, so that their number tells."""
        return [step for step in steps_of(a, b) if not (self.seed and step == "carry 0")]

    def show(self, ids):
        """Ids up to the first <|endoftext|> (or the padding -1) as text."""
        ids = [int(i) for i in ids]
        end = next((n for n, i in enumerate(ids) if i in (self.eos, -1)), len(ids))
        return self.enc.decode(ids[:end])

class Batch(NamedTuple):
    """Problems of one length. `*_target[t]` is the token that position t must predict, or IGNORE."""
    prefix: torch.Tensor  # (B, T) problem <bot> and the text steps, padded on the left
    valid: torch.Tensor  # (B, T) bool, False at padding
    text_target: torch.Tensor  # (B, T') for the last T' positions of the prefix: the text steps; T' = 0 without any
    answer: torch.Tensor  # (B, D+1 or D+2) <eot> and the answer, padded on the right
    answer_target: torch.Tensor  # the same shape

def pad(rows, fill, left=False):
    """Sequences of ids -> (n, longest) int array, filled up on one side."""
    width = max(map(len, rows))
    fills = [(fill,) * (width - len(row)) for row in rows]
    return np.array([(*f, *row) if left else (*row, *f) for f, row in zip(fills, rows)], dtype=np.int64)

def make_batch(text, pairs, n_text, device="cpu"):
    """Problems (n, 2) of one length with their first n_text steps as text -> Batch."""
    heads, bodies, answers = [], [], []
    for a, b in pairs.tolist():
        heads.append(text.ids(text.problem(a, b) + (" <bot>" if text.seed else "=<bot>")))
        bodies.append(tuple(i for step in steps_of(a, b)[:n_text] for i in (*text.ids(step), text.sep)))
        answers.append(text.ids(f"<eot> {a + b}" if text.seed else f"<eot>{a + b}<|endoftext|>"))
    prefix = [head + body for head, body in zip(heads, bodies)]
    valid = pad([(1,) * len(row) for row in prefix], 0, left=True) == 1
    # Targets stand one to the left of their tokens, since position t predicts t+1; the harness feeds what follows the
    # last <sep>, so nothing is to be predicted there.
    arrays = (pad(prefix, text.eos, left=True), valid,
              pad([(*body, IGNORE) if n_text else () for body in bodies], IGNORE, left=True),
              pad([row[:-1] for row in answers], text.eos), pad([row[1:] for row in answers], IGNORE))
    batch = Batch(*(torch.from_numpy(x).to(device) for x in arrays))
    return batch._replace(valid=None) if valid.all() else batch

# -----------------------------------------------------------------------------------------------------------
# 4. GPT-2: names and layouts of the released state dict (openai/gpt-2 src/model.py)
class Conv1D(nn.Module):
    """GPT-2's linear layer, y = x W + b with W stored (in, out), and room for a LoRA adapter (section 6)."""

    def __init__(self, n_in, n_out, std):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(n_in, n_out) * std)
        self.bias = nn.Parameter(torch.zeros(n_out))
        self.lora_scale = 0.0

    def forward(self, x):
        y = F.linear(x, self.weight.t(), self.bias)
        if self.lora_scale:
            y = y + (x @ self.lora_a) @ self.lora_b * self.lora_scale
        return y

class Attention(nn.Module):
    def __init__(self, width, heads, std, out_std):
        super().__init__()
        self.c_attn = Conv1D(width, 3 * width, std)
        self.c_proj = Conv1D(width, width, out_std)
        self.heads = heads

    def forward(self, x, past, mask, last):
        """x (B, T, C); past: keys and values (B, H, S, C/H) or None; mask bool (B|1, 1, last, S+T) or None: causal.
        -> (B, last, C), for the last positions only; the longer keys and values."""
        B, T, C = x.shape
        qkv = self.c_attn(x).view(B, T, 3, self.heads, C // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, H, T, C/H)
        if past is not None:
            k, v = torch.cat([past[0], k], dim=2), torch.cat([past[1], v], dim=2)
        q = q[:, :, T - last:]
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None and last > 1)
        return self.c_proj(y.transpose(1, 2).reshape(B, last, C)), (k, v)

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

    def forward(self, x, past, mask, last):
        a, kv = self.attn(self.ln_1(x), past, mask, last)
        x = x[:, x.shape[1] - last:] + a
        return x + self.mlp(self.ln_2(x)), kv

class Cache(NamedTuple):
    """What earlier calls leave to later ones."""
    kv: tuple  # per layer: keys and values, each (B, H, S, C/H)
    valid: torch.Tensor | None  # (B, S) bool: positions that may be attended to; None: all
    pos: torch.Tensor | int  # position of the next token: (B, 1), or one for all rows

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
        S = 0 if cache is None else cache.kv[0][0].shape[2]
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
        at = (pos + count.cumsum(1) - 1).clamp_min(0)  # (B, T); padding before the first token gets position 0
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
        K = thoughts.count
        valid = None if cache.valid is None else cache.valid[:, -K:]
        cache = Cache(tuple((k[:, :, -K:], v[:, :, -K:]) for k, v in cache.kv), valid, cache.pos)
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
    slots = len(text.steps(*pairs[0].tolist()))
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
        longest = len(text.ids(column_text(9, 9, 1, 9, 1))) + 1
        _, h, cache = write(model, h, cache, text.sep, limit=text_slots * longest, times=text_slots)
    return think(model, h, cache, thoughts, read)

@torch.no_grad()
def answer(text, model, cache, digits):
    """Greedy answers (a list of text) after the thoughts in the cache; "..." stands for a missing end token."""
    B = cache.kv[0][0].shape[0]
    eot = torch.full((B, 1), text.eot, device=model.wte.weight.device)
    h, cache, _ = model(model.wte(eot), cache)
    ids, _, _ = write(model, h, cache, text.eos, limit=15 if text.seed else digits + 3)
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

# -----------------------------------------------------------------------------------------------------------
# 6. Injection (Activation Oracles, section 3) and LoRA
class Injection(NamedTuple):
    """Readings to be added to the residual stream: h' = h + scale * ||h|| * v / ||v||, at given positions only."""
    layer: int
    vectors: torch.Tensor  # (B, A, C), one per <act> token
    positions: torch.Tensor  # (B, A)
    scale: float

    def at(self, layer, x):
        """x (B, T, C) with the vectors added if this is the layer, out of place."""
        if layer != self.layer:
            return x
        index = self.positions[:, :, None].expand(-1, -1, x.shape[2])
        h = x.gather(1, index)
        unit = self.vectors / self.vectors.norm(dim=-1, keepdim=True).clamp_min(1e-8)
        return x.scatter_add(1, index, (self.scale * h.norm(dim=-1, keepdim=True) * unit).to(x.dtype))

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
    with torch.device("meta" if weights else "cpu"):
        model = GPT(run.text.size, *SIZES[cfg.model], cfg.positions)
    if weights:
        model.load_state_dict({name: w.float() for name, w in weights.items()}, assign=True)
    for block in model.h if cfg.compile else ():
        block.compile(dynamic=True)
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

def amp(cfg):
    """bfloat16 matrix products where asked for; weights and optimizer stay float32."""
    return torch.autocast(cfg.device, torch.bfloat16) if cfg.dtype == "bfloat16" else nullcontext()

def write_text(path, content):
    """Write a file whole or not at all."""
    part = path.with_name(path.name + ".tmp")
    part.write_text(content)
    os.replace(part, path)

def record(run, **sections):
    """Merge sections into results.json, at every depth."""
    def merge(old, new):
        both = isinstance(old, dict) and isinstance(new, dict)
        return {**old, **{key: merge(old.get(key), value) for key, value in new.items()}} if both else new
    results = merge(load_json(run.out / "results.json"), sections)
    write_text(run.out / "results.json", json.dumps(results, indent=1) + "\n")
    return results

def load_last(run, part=None, params=(), optimizers=()):
    """With --resume: the part that last.pt stands in; if it is `part`, its step, and its state goes into the arguments."""
    path = run.out / "last.pt"
    if not run.cfg.resume or not path.exists():
        return None, 0
    try:
        last = torch.load(path, map_location=run.cfg.device, weights_only=True)
        if last["part"] == part:
            with torch.no_grad():
                for p, old in zip(params, last["params"], strict=True):
                    p.copy_(old)
            for optimizer, old in zip(optimizers, last["optimizers"], strict=True):
                optimizer.load_state_dict(old)
        return last["part"], last["step"] if last["part"] == part else 0
    except Exception as e:  # a damaged or hostile file raises nearly anything
        raise UserError(f"{path} is no checkpoint of this run: delete it to train its part again") from e

def make_optimizers(model, lr, muon_lr=0.0, decay=0.01):
    """AdamW on what is trainable; with muon_lr > 0, Muon (Jordan et al. 2024) on the blocks' matrices instead.

    After 500 oracle steps on the same thoughts, Muon's oracle read 0.70 of the steps, AdamW's 0.48 (single trials, validation).
    """
    params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    matrices = [p for name, p in params.items() if muon_lr and p.ndim == 2 and name.startswith("h.")]
    rest = [p for p in params.values() if all(p is not m for m in matrices)]
    optimizers = [torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.98), weight_decay=decay, fused=True)] if rest else []
    optimizers += [torch.optim.Muon(matrices, lr=muon_lr, weight_decay=0.0)] if matrices else []
    for group in [g for o in optimizers for g in o.param_groups]:
        group["peak"] = group["lr"]
    return optimizers

def fit(run, part, model, optimizers, loss_of, steps):
    """The training loop of every part: linear warm-up over 50 steps, then linear decay to zero.

    loss_of(step) -> (loss, (B,) which examples are right); its data is a function of the step.
    """
    cfg, begin = run.cfg, time.time()
    params = [p for p in model.parameters() if p.requires_grad]
    _, first = load_last(run, part, params, optimizers)
    saved = logged = begin
    sums, count = torch.zeros(2, device=cfg.device), 0
    for step in range(first, steps):
        for group in [g for o in optimizers for g in o.param_groups]:
            group["lr"] = group["peak"] * min((step + 1) / 50, 1 - step / steps)
        with amp(cfg):
            loss, exact = loss_of(step)
        loss.backward()
        nn.utils.clip_grad_norm_(params, 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        sums += torch.stack([loss.detach(), exact.mean()])  # stays on the device: no wait for it within the interval
        count, now = count + 1, time.time()
        if (step + 1) % cfg.log_every == 0 or step + 1 == steps:
            log(run, part, step + 1, steps, *(sums / count).tolist(), cfg.batch_size * count / (now - logged),
                (now - begin) / (step + 1 - first) * (steps - step - 1))
            logged, count = time.time(), 0
            sums.zero_()
        if now - saved > cfg.save_every or step + 1 == steps:
            torch.save({"part": part, "step": step + 1, "params": [p.detach() for p in params],
                        "optimizers": [o.state_dict() for o in optimizers]}, run.out / "last.pt.tmp")
            os.replace(run.out / "last.pt.tmp", run.out / "last.pt")
            saved = now

def log(run, part, step, steps, loss, exact, speed, eta):
    """One line on the terminal and one object in log.jsonl."""
    print(f"{part:<11} | step {step:>5}/{steps} | loss {loss:6.4f} | exact {exact:5.3f} | {speed:7,.0f} ex/s | "
          f"eta {int(eta) // 60}:{int(eta) % 60:02d}", flush=True)
    with open(run.out / "log.jsonl", "a") as f:
        f.write(json.dumps({"part": part, "step": step, "steps": steps, "loss": round(loss, 6),
                            "exact": round(exact, 6), "examples_per_second": round(speed, 1)}) + "\n")

# -----------------------------------------------------------------------------------------------------------
# 8. Coconut: from text steps to thoughts
def coconut_loss(model, batch, thoughts):
    """Cross-entropy on what the model must write: its text steps and the answer, never the problem's digits.

    -> mean loss over those tokens; (B,) 1. where the whole answer is right under teacher forcing, else 0.
    """
    n_text = batch.text_target.shape[1]
    h, cache, _ = model(model.wte(batch.prefix), valid=batch.valid, last=max(n_text, 1))
    cache, _ = think(model, h[:, -1:], cache, thoughts)
    said, _, _ = model(model.wte(batch.answer), cache)
    written = torch.cat([h[:, h.shape[1] - n_text:], said], dim=1)  # logits only where they are used
    target = torch.cat([batch.text_target, batch.answer_target], dim=1)
    logits = model.logits(written)
    loss = F.cross_entropy(logits.flatten(0, 1).float(), target.flatten(), ignore_index=IGNORE)
    return loss, all_right(logits[:, n_text:], batch.answer_target)

def all_right(logits, target):
    """Rows (B,) whose every target token has the highest logit, as 0. or 1."""
    return ((logits.argmax(-1) == target) | (target == IGNORE)).all(dim=1).float()

def coconut_batch(run, step, k, purpose, size):
    """The training batch of a step at stage k, and its Thoughts: one operand length a batch."""
    rng = rng_of(run.cfg.seed, purpose, step)
    pairs = draw(rng, TRAIN, int(rng.choice(run.cfg.digits)), size)
    text_slots, thoughts = plan(run.cfg, run.text, pairs, k)
    return make_batch(run.text, pairs, text_slots, run.cfg.device), thoughts

def stage_name(cfg, k):
    return {max(cfg.digits) + 1: "all", max(cfg.digits) + 2: "bottleneck"}.get(k, str(k))

def train_coconut(run):
    """The curriculum: text, then ever more latent slots. Each stage is measured on the test split as it ends."""
    cfg, model = run.cfg, load_model(run, "base") if run.cfg.pretrained else new_model(run)
    names = [f"coconut {stage_name(cfg, k)}" for k in cfg.curriculum]
    reached, _ = load_last(run)
    begin = names.index(reached) if reached in names else 0
    for name, k in list(zip(names, cfg.curriculum))[begin:]:
        def loss_of(step):
            again = rng_of(cfg.seed, "mix", step).random() < cfg.mix
            batch, thoughts = coconut_batch(run, step, 0 if again else k, name, cfg.batch_size)
            return coconut_loss(model, batch, thoughts)
        steps = {"0": cfg.text_steps, "all": cfg.latent_steps, "bottleneck": cfg.bottleneck_steps}
        # Muon is the quickest. AdamW with this much weight decay leaves more in a thought to read: after 600 oracle
        # steps, decay 0.5 and rate 1e-3 gave 0.73 of the steps, 1.0 and 1e-3 0.82, 1.0 and 2e-3 0.87 (single trials).
        recipe = {"all": (cfg.latent_lr, 0, cfg.latent_decay), "bottleneck": (cfg.latent_lr, 0, cfg.bottleneck_decay)}
        recipe = recipe.get(stage_name(cfg, k), (cfg.text_lr, cfg.text_muon, cfg.text_decay))
        fit(run, name, model, make_optimizers(model, *recipe), loss_of,
            steps.get(stage_name(cfg, k), k * cfg.stage_steps))
        if k == 0 and not cfg.pretrained:
            write_safetensors(run.out / "base.safetensors", model.state_dict())
        scores = coconut_scores(run, model, k)
        print(f"{name:<11} | held-out exact match {show_rate(scores)}, teacher-forced "
              f"{scores['teacher_forced']['exact']:.3f}", flush=True)
        record(run, coconut={"stages": {stage_name(cfg, k): scores}})
    write_safetensors(run.out / "coconut.safetensors", model.state_dict())

# -----------------------------------------------------------------------------------------------------------
# 9. Oracles: read a thought's hidden state in words
class Pool(NamedTuple):
    """Readings of all slots of some problems, problem after problem, with what they are readings of."""
    vectors: torch.Tensor  # (N, R, C), one for each layer read
    pairs: np.ndarray  # (N, 2)
    slot: np.ndarray  # (N,)
    slots: np.ndarray  # (N,) number of slots of the problem
    text: Text

    @property
    def digits(self):
        """(N,) number of digits of an operand; also the slot of the final carry."""
        return np.array([len(str(a)) for a in self.pairs[:, 0]])

    def target(self, i, family):
        """The text that answers a question of this family about reading i."""
        a, b = self.pairs[i].tolist()
        if family == "step":
            return self.text.steps(a, b)[self.slot[i]]
        return str(a + b) if family == "answer" else self.text.problem(a, b)

def collect(run, model, problems, white=lambda vectors: vectors):
    """Let the model think about problems (a list of (n, 2), one per length), all slots latent -> Pool."""
    cfg, parts = run.cfg, []
    for pairs in problems:
        with amp(cfg):
            _, read = ponder(cfg, run.text, model, pairs, cfg.curriculum[-1], read=cfg.layers)
        read = read[:, cfg.thoughts_per_slot - 1::cfg.thoughts_per_slot]  # a slot's last thought: (n, slots, R, C)
        n, slots = read.shape[:2]
        parts.append(Pool(white(read.flatten(0, 1)).float(), pairs.repeat(slots, axis=0), np.tile(np.arange(slots), n),
                          np.full(n * slots, slots), run.text))
    return Pool(torch.cat([p.vectors for p in parts]), *(np.concatenate(x) for x in list(zip(*parts))[1:4]), run.text)

def whitener(run, model):
    """-> function of readings (..., R, C): with --whiten, each layer's centred and of unit variance in all directions.

    Thoughts vary by orders of magnitude more along what the model uses than along the rest; injected as they are, the
    rest is lost. ZCA (Kessy et al. 2018) is the whitening that stays closest to the residual stream's own axes. Its
    statistics are a function of the model and of training readings alone.
    """
    cfg = run.cfg
    if not cfg.whiten:
        return lambda vectors: vectors
    train = chunks(draw(rng_of(cfg.seed, "whiten", d), TRAIN, d, 1000) for d in cfg.digits)
    x, zca = collect(run, model, train).vectors.double(), []
    for layer in (x - x.mean(0)).unbind(1):
        variance, axes = torch.linalg.eigh(torch.cov(layer.T))
        zca.append(axes @ torch.diag((variance.clamp_min(0) + 1e-6 * variance.max()).rsqrt()) @ axes.T)
    mean, zca = x.mean(0), torch.stack(zca)
    # float64: autocast leaves it alone
    return lambda vectors: torch.einsum("...rc,rcd->...rd", vectors.double() - mean, zca).float()

def prompt(cfg, question, acts=1):
    layers = ", ".join(str(layer - (cfg.protocol == "seed")) for layer in cfg.layers)
    return f"Layer {layers}: {'<act>' * acts} {question}"

def oracle_rows(text, prompts, targets, device):
    """Prompts with their targets -> ids (B, T), targets (B, T') for the last T' positions with IGNORE over the prompt,
    <act> positions (B, A). Built from token ids: the prompt's and the target's are joined, never their strings.
    """
    pairs = [(text.ids(p), (*text.ids(t), text.eos)) for p, t in zip(prompts, targets)]
    ids = pad([(p + t)[:-1] for p, t in pairs], text.eos)
    target = pad([(IGNORE,) * (len(p) - 1) + t for p, t in pairs], IGNORE)
    target = np.ascontiguousarray(target[:, min(len(p) for p, _ in pairs) - 1:])
    act = np.array([[at for at, i in enumerate(p) if i == text.act] for p, _ in pairs])
    return tuple(torch.from_numpy(x).to(device) for x in (ids, target, act))

def oracle_loss(cfg, model, rows, vectors):
    """Cross-entropy of the targets given readings (B, A, C). -> mean loss, (B,) 1. where all is right."""
    ids, target, act = rows
    injection = Injection(cfg.inject_layer, vectors, act, cfg.scale)
    h, _, _ = model(model.wte(ids), inject=injection, last=target.shape[1])
    logits = model.logits(h)
    return (F.cross_entropy(logits.flatten(0, 1).float(), target.flatten(), ignore_index=IGNORE),
            all_right(logits, target))

def oracle_batches(run, coconut, split, purpose, size):
    """-> batch_at(step): rows and readings of fresh problems, for both oracles in the same order.

    Readings are collected for some 512 problems of the greatest length at a time, and half as many for each digit less,
    as these are learnt sooner. Each is asked about its step at most once; 3% of the rows ask the last thought for the
    answer, 3% for the problem (the seed asks these of it, too).
    All rows of a batch ask a family in one phrasing: less padding.
    """
    cfg, white = run.cfg, whitener(run, coconut)
    count = {d: 2 * (max(256, size) >> (max(cfg.digits) - d)) for d in cfg.digits}
    per_pool = sum(n * d + n // 2 for d, n in count.items()) // size
    @lru_cache(maxsize=1)
    def pool_at(refill):
        rng = rng_of(cfg.seed, purpose, "pool", refill)
        pool = collect(run, coconut, [draw(rng, split, d, n) for d, n in count.items()], white)
        # The last slot has two answers: those of every other problem will do.
        final = pool.slot == pool.digits
        asked = ~final | (np.cumsum(pool.slot == 0) % 2 == 0)
        return pool, rng.permutation(np.flatnonzero(asked)), np.flatnonzero(final)
    def batch_at(step):
        pool, order, final = pool_at(step // per_pool)
        rng = rng_of(cfg.seed, purpose, step)
        start = step % per_pool * size
        index = order[start:start + size].copy()
        families = rng.choice(list(QUESTIONS), size=len(index), p=(0.94, 0.03, 0.03))
        whole = families != "step"
        index[whole] = rng.choice(final, size=whole.sum())
        asked = {family: prompt(cfg, str(rng.choice(TRAINED[family])), len(cfg.layers)) for family in QUESTIONS}
        targets = [pool.target(i, f) for i, f in zip(index, families)]
        rows = oracle_rows(run.text, [asked[f] for f in families], targets, cfg.device)
        return rows, pool.vectors[torch.from_numpy(index)]
    return batch_at

def train_oracle(run):
    """Self-oracle: the Coconut model, fine-tuned to read the thoughts of its frozen former self."""
    cfg, coconut, model = run.cfg, load_model(run, "coconut"), load_model(run, "coconut")
    batch_at = oracle_batches(run, coconut, TRAIN, "oracle", cfg.batch_size)
    def loss_of(step):
        loss, exact = oracle_loss(cfg, model, *batch_at(step))
        rng = rng_of(cfg.seed, "which rehearsal", step)
        if rng.random() < cfg.rehearsal:
            # Text CoT or thoughts, a quarter of a batch: after text alone (as in the seed) none of 1000 held-out
            # problems was still solved in thoughts. Added to the oracle's loss, since every step of Muon is as large
            # as any other.
            k = cfg.curriculum[-1] if rng.random() < 0.5 else 0
            batch, thoughts = coconut_batch(run, step, k, "rehearsal", math.ceil(cfg.batch_size / 4))
            loss = loss + coconut_loss(model, batch, thoughts)[0]
        return loss, exact
    fit(run, "oracle", model, make_optimizers(model, cfg.oracle_lr, cfg.oracle_muon), loss_of, cfg.oracle_steps)
    write_safetensors(run.out / "oracle.safetensors", model.state_dict())

def train_lora(run):
    """LoRA oracle: a separate, frozen base model (from scratch: the stage-0 model) with adapters, on the same data."""
    cfg, coconut, model = run.cfg, load_model(run, "coconut"), load_model(run, "base")
    add_lora(model, cfg.lora_rank)
    batch_at = oracle_batches(run, coconut, TRAIN, "oracle", cfg.batch_size)
    fit(run, "lora", model, make_optimizers(model, cfg.lora_lr, cfg.lora_muon),
        lambda step: oracle_loss(cfg, model, *batch_at(step)), cfg.lora_steps)
    write_safetensors(run.out / "lora.safetensors", {k: p for k, p in model.state_dict().items() if ".lora_" in k})

def ask(run, oracle, vectors, question):
    """The oracle's greedy answers to one question about readings (N, A, C); a zero reading injects nothing."""
    cfg, text, answers = run.cfg, run.text, []
    ids = torch.tensor([text.ids(prompt(cfg, question, vectors.shape[1]))], device=cfg.device)
    at = (ids == text.act).nonzero()[:, 1][None]
    # The seed's oracle never learnt to begin its answer, and is asked for it so (scripts/10, evaluate).
    short = question == SEED_QUESTIONS["answer"]
    hold = (text.seed * (2 if short else 3), (text.eos, text.bot, text.sep, text.eot, text.act))
    for chunk in vectors.split(1024):
        n = len(chunk)
        injection = Injection(cfg.inject_layer, chunk, at.expand(n, -1), cfg.scale)
        with torch.no_grad(), amp(cfg):
            h, cache, _ = oracle(oracle.wte(ids.expand(n, -1)), inject=injection, last=1)
            written, _, _ = write(oracle, h, cache, text.eos, limit=10 if text.seed and short else 25, hold=hold)
        answers += [text.show(row) for row in written.tolist()]
    if text.seed:
        answers = [(re.search(r"\d+", s) or [""])[0] if short else s.strip() for s in answers]
    return answers

# -----------------------------------------------------------------------------------------------------------
# 10. Probes: what a classifier of one or two layers finds in the same readings
PROBED = {"a": 10, "b": 10, "carry": 2, "digit": 10, "step": 200}  # name: classes; step: both operands and carry-in

def new_probe(width, hidden=0):
    """Linear (hidden = 0) or one-hidden-layer classifiers of a standardized reading (N, C), side by side."""
    body = [nn.Linear(width, hidden), nn.GELU()] if hidden else []
    return nn.Sequential(nn.BatchNorm1d(width, affine=False), *body, nn.Linear(hidden or width, sum(PROBED.values())))

def probe_data(pool):
    """-> readings (N, R C) and labels (N, 5), final slots left out: they have no operands."""
    keep = pool.slot < pool.digits
    labels = []
    for (a, b), slot in zip(pool.pairs[keep].tolist(), pool.slot[keep]):
        da, db, carry, digit, _ = columns(a, b)[slot]
        labels.append((da, db, carry, digit, (da * 10 + db) * 2 + carry))
    keep = torch.from_numpy(keep)
    return pool.vectors[keep.to(pool.vectors.device)].flatten(1), torch.tensor(labels, device=pool.vectors.device)

def probe_hits(probe, x, y):
    """-> bool (N, 5): which labels the probe gets right."""
    with torch.no_grad():
        parts = probe.eval()(x).split(list(PROBED.values()), dim=1)
    return torch.stack([part.argmax(-1) for part in parts], dim=1) == y

def fit_probe(run, hidden, train, validation):
    """Cross-entropy on train; the epoch with the best mean validation accuracy is kept. -> Probe"""
    cfg, (x, y) = run.cfg, train
    torch.manual_seed(cfg.seed)
    probe = new_probe(x.shape[1], hidden).to(cfg.device)
    optimizer = torch.optim.AdamW(probe.parameters(), lr=3e-3 if hidden else 1e-2, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, cfg.probe_epochs)
    best, kept = -1.0, None
    for epoch in range(cfg.probe_epochs):
        order = torch.from_numpy(rng_of(cfg.seed, "probe", epoch).permutation(len(x))).to(cfg.device)
        for index in order.split(512):
            parts = probe.train()(x[index]).split(list(PROBED.values()), dim=1)
            loss = sum(F.cross_entropy(part, y[index, i]) for i, part in enumerate(parts))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()
        score = probe_hits(probe, *validation).float().mean().item()
        if score > best:
            best, kept = score, copy.deepcopy(probe.state_dict())
    probe.load_state_dict(kept)
    return probe

def train_probes(run):
    """Linear and one-hidden-layer probes: trained on train, chosen on validation, reported once on test."""
    cfg, coconut = run.cfg, load_model(run, "coconut")
    white = whitener(run, coconut)
    def data(problems):
        return probe_data(collect(run, coconut, problems, white))
    sets = [data(chunks(draw(rng_of(cfg.seed, "probes", split, d), split, d, n) for d in cfg.digits))
            for split, n in ((TRAIN, cfg.probe_problems), (VALIDATION, 1000))]
    test = data(test_problems(run))
    weights, scores = {}, {}
    for kind, hidden in (("linear", 0), ("mlp", 512)):
        probe = fit_probe(run, hidden, *sets)
        hits = probe_hits(probe, *test).cpu().numpy()
        scores[kind] = {name: rate(hits[:, i]) for i, name in enumerate(PROBED)}
        weights.update({f"{kind}.{name}": p for name, p in probe.state_dict().items()})
        print(f"probe {kind:<6}| " + " | ".join(f"{name} {scores[kind][name]['exact']:.3f}" for name in PROBED))
    record(run, probes=scores)
    write_safetensors(run.out / "probes.safetensors", weights)

# -----------------------------------------------------------------------------------------------------------
# 11. Evaluation: rates with their intervals, controls, the report
def rate(hits):
    """Array of bool -> {"exact", "n", "ci95"}: a share in [0, 1] (or None) with its Wilson 95% interval (1927)."""
    n, z = len(hits), 1.959964
    if not n:
        return {"exact": None, "n": 0, "ci95": [0.0, 1.0]}
    p = float(np.mean(hits))
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    low, high = ((middle + sign * half) / (1 + z * z / n) for sign in (-1, 1))
    return {"exact": p, "n": n, "ci95": [max(0.0, min(p, low)), min(1.0, max(p, high))]}  # p: against rounding

def show_rate(r):
    return f"{r['exact']:.3f} [{r['ci95'][0]:.3f}, {r['ci95'][1]:.3f}] n={r['n']}" if r["n"] else "n=0"

def test_problems(run):
    """The held-out problems of every evaluation, distinct, in batches (<= 250, 2) of one length and number of steps."""
    cfg, groups = run.cfg, []
    n = max(2, math.ceil(cfg.eval_problems / len(cfg.digits)))  # the controls need another problem
    for d in cfg.digits:
        pairs = draw(rng_of(cfg.seed, "test", d), TEST, d, n, distinct=True)
        steps = np.array([len(run.text.steps(a, b)) for a, b in pairs.tolist()])
        groups += [pairs[steps == count] for count in np.unique(steps)]
    return chunks(groups)

def coconut_scores(run, model, k):
    """Held-out exact match at stage k, autoregressive from the problem alone -> R, with by_digits beside it, and
    teacher_forced: gold text steps and answer prefix given, as others report it."""
    cfg, by_digits, forced = run.cfg, {}, []
    for pairs in test_problems(run):
        digits = len(str(pairs[0, 0]))
        text_slots, thoughts = plan(cfg, run.text, pairs, k)
        with torch.no_grad(), amp(cfg):
            answers = answer(run.text, model, ponder(cfg, run.text, model, pairs, k)[0], digits)
            forced += coconut_loss(model, make_batch(run.text, pairs, text_slots, cfg.device), thoughts)[1].tolist()
        by_digits.setdefault(str(digits), []).extend(s == str(a + b) for s, (a, b) in zip(answers, pairs.tolist()))
    return {**rate(sum(by_digits.values(), [])), "teacher_forced": rate(forced),
            "by_digits": {digits: rate(hits) for digits, hits in by_digits.items()}}

def score_steps(said, gold, final):
    """Lists of said and gold steps, bool array of final-carry slots -> S (see the README).

    operands: both digits and the carry-in right; result: digit and carry-out right (both without the final slot, which
    has neither); token_f1: of the sets of white-space-separated words, as the seed counts it.
    """
    exact = np.array([s == g for s, g in zip(said, gold)])
    operands = np.array([s.partition("=")[0] == g.partition("=")[0] for s, g in zip(said, gold)])
    result = np.array([s.partition(" write ")[2] == g.partition(" write ")[2] for s, g in zip(said, gold)])
    words = [(set(s.split()), set(g.split())) for s, g in zip(said, gold)]
    f1 = [2 * len(s & g) / (len(s) + len(g)) for s, g in words]
    inner = rate(exact[~final])
    return {**rate(exact), "operands": float(operands[~final].mean()), "result": float(result[~final].mean()),
            "token_f1": float(np.mean(f1)), "exact_no_final": inner["exact"], "n_no_final": inner["n"],
            "ci95_no_final": inner["ci95"]}

def other_reading(kind, pool, rng):
    """Which reading each control injects in place of reading i -> index (N,).

    shuffled: any other; shuffled_same_slot: same slot of another problem of the same length; wrong_slot: another slot
    of the same problem. Cyclic shifts of a random order: no reading ever meets itself.
    """
    index = np.arange(len(pool.slot))
    if kind == "wrong_slot":
        return index - pool.slot + (pool.slot + rng.integers(1, pool.slots)) % pool.slots
    groups = pool.digits * 100 + pool.slot if kind == "shuffled_same_slot" else np.zeros_like(index)
    source = index.copy()
    for group in np.unique(groups):
        order = rng.permutation(index[groups == group])
        source[order] = np.roll(order, 1)
    return source

def majorities(run):
    """The most frequent training step overall, and in each (number of digits, slot): baselines that read nothing."""
    seen, overall = Counter(), Counter()
    for d in run.cfg.digits:
        for a, b in draw(rng_of(run.cfg.seed, "majority", d), TRAIN, d, 5000).tolist():
            steps = run.text.steps(a, b)
            seen.update((d, slot, step) for slot, step in enumerate(steps))
            overall.update(steps)
    by_slot = {key[:2]: key[2] for key, _ in reversed(seen.most_common())}  # the most frequent comes last, and stays
    return overall.most_common(1)[0][0], by_slot

def control_scores(run, oracle, pool):
    """Step scores with the wrong vector, or with none, and of baselines that read nothing -> {name: S}."""
    rng = rng_of(run.cfg.seed, "controls")
    gold, final = [pool.target(i, "step") for i in range(len(pool.slot))], pool.slot == pool.digits
    noise = torch.from_numpy(rng.standard_normal(pool.vectors.shape)).to(pool.vectors)
    vectors = {"none": torch.zeros_like(pool.vectors), "random": noise}  # injection matches the norm
    for kind in ("shuffled", "shuffled_same_slot", "wrong_slot"):
        vectors[kind] = pool.vectors[torch.from_numpy(other_reading(kind, pool, rng)).to(pool.vectors.device)]
    question = (SEED_QUESTIONS if run.text.seed else HELD_OUT)["step"]
    scores = {kind: score_steps(ask(run, oracle, v, question), gold, final) for kind, v in vectors.items()}
    constant, by_slot = majorities(run)
    scores["constant"] = score_steps([constant] * len(gold), gold, final)
    scores["slot_majority"] = score_steps([by_slot[key] for key in zip(pool.digits, pool.slot)], gold, final)
    return scores

def oracle_scores(run, oracle, pool):
    """All three question families in their held-out phrasing -> the oracle's section of results.json."""
    scores, questions = {}, SEED_QUESTIONS if run.text.seed else HELD_OUT
    last = np.flatnonzero(pool.slot == pool.slots - 1)
    for family, index in (("step", np.arange(len(pool.slot))), ("answer", last), ("problem", last)):
        gold = [pool.target(i, family) for i in index]
        said = ask(run, oracle, pool.vectors[torch.from_numpy(index)], questions[family])
        right = np.array([s == g for s, g in zip(said, gold)])
        if family == "step":
            scores["step"] = score_steps(said, gold, pool.slot == pool.digits)
            scores["by_slot"] = {str(s): rate(right[pool.slot == s]) for s in np.unique(pool.slot)}
            scores["mistakes"] = [{"problem": pool.target(i, "problem"), "slot": int(pool.slot[i]), "step": gold[i],
                                   "read": said[i]} for i in np.flatnonzero(~right)[:5]]
        else:
            scores[family] = rate(right)
    return scores

def digits_of(answers, D):
    """Answers as text -> (n, D) str: the digits of the lowest D columns, lowest first; "" where there is none."""
    return np.array([[said[::-1][c:c + 1] for c in range(D)] for said in answers])

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
        D = len(str(pairs[0, 0]))
        cache, _ = ponder(cfg, run.text, model, pairs, cfg.curriculum[-1])
        own = np.array(answer(run.text, model, cache, D))
        other, slot_of = np.roll(own, 1), torch.arange((D + 1) * cfg.thoughts_per_slot) // cfg.thoughts_per_slot
        for kind, change in changes.items():
            donor = cache._replace(kv=tuple((change(k), change(v)) for k, v in cache.kv))
            for slot in (*range(D + 1), "all"):
                at = (slot_of == slot if slot != "all" else slot_of >= 0)[None].to(cfg.device)
                said = np.array(answer(run.text, model, exchange(cache, donor, at), D))
                hits["keep", kind, slot] += (said == own).tolist()
                if (kind, slot) == ("swap", "all"):
                    b, a = said == other, said == own
                    for name, whose in (("b", b), ("a", a), ("neither", ~(a | b))):
                        hits["interchange", name] += whose[own != other].tolist()
                elif kind == "swap":
                    a, b, now = (digits_of(texts, D) for texts in (own, other, said))
                    for c in range(D):
                        hits["map", D, slot, c] += (now == b)[:, c][(a != b)[:, c]].tolist()
    slots = range(max(cfg.digits) + 1)
    return {"keep": {kind: rate(hits["keep", kind, "all"]) for kind in changes},
            "keep_by_slot": {kind: {str(slot): rate(hits["keep", kind, slot]) for slot in slots} for kind in changes},
            "interchange": {name: rate(hits["interchange", name]) for name in ("b", "a", "neither")},
            "map": {str(D): [[rate(hits["map", D, slot, c])["exact"] for c in range(D)] for slot in range(D + 1)]
                    for D in cfg.digits}}

def evaluate(run):
    """Everything that is measured on the test split -> results.json."""
    cfg, last = run.cfg, run.cfg.curriculum[-1]
    coconut, oracle = load_model(run, "coconut"), load_model(run, "oracle")
    pool = collect(run, coconut, test_problems(run), whitener(run, coconut))
    scores = coconut_scores(run, coconut, last)
    sections = {"coconut": {"stages": {stage_name(cfg, last): scores}, "by_digits": scores["by_digits"],
                            "teacher_forced": scores["teacher_forced"],
                            "no_thoughts": coconut_scores(run, coconut, None)},
                "oracle": oracle_scores(run, oracle, pool), "controls": control_scores(run, oracle, pool)}
    if cfg.protocol == "own":
        lora = load_model(run, "lora")
        sections["lora"] = oracle_scores(run, lora, pool) | {"controls": control_scores(run, lora, pool)}
        batch_at = oracle_batches(run, coconut, VALIDATION, "validation", 256)
        for name, model in (("oracle", oracle), ("lora", lora)):
            with torch.no_grad(), amp(cfg):
                losses = [oracle_loss(cfg, model, *batch_at(i))[0].item() for i in range(10)]
            sections[name]["val_loss"] = float(np.mean(losses))
        with amp(cfg):
            sections["causal"] = causal_scores(run, coconut)
    sections["oracle"]["coconut_after"] = coconut_scores(run, oracle, last)
    record(run, config=load_json(run.out / "config.json"), env=environment(cfg), **sections)

def environment(cfg):
    """Versions and hardware, for results.json."""
    ask = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    git = subprocess.run(ask, capture_output=True, text=True, check=False).stdout if shutil.which("git") else ""
    device = torch.cuda.get_device_name() if cfg.device == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    return {"torch": torch.__version__, "device": device, "git": git.strip()}

def print_table(results):
    """The report: every figure with n, its interval and the controls beside it."""
    coconut, oracles = results["coconut"], {name: results[name] for name in ("oracle", "lora") if name in results}
    print("\ncoconut, held-out problems          exact match (95% interval)          teacher-forced")
    rows = {f"stage {name}": r for name, r in coconut["stages"].items()}
    rows |= {f"all, {digits} digits": r for digits, r in coconut["by_digits"].items()}
    rows |= {"all, the answer asked for at once": coconut["no_thoughts"],
             "all, after the oracle's training": oracles["oracle"]["coconut_after"]}
    for name, r in rows.items():
        forced = f"{r['teacher_forced']['exact']:>15.3f}" if name.startswith("stage") else ""
        print(f"  {name:<33} {show_rate(r):>27}{forced}")
    print("\nreading one thought, step           exact   without final slot (95%)  operands  result      F1")
    rows = {f"{'self-' if name == 'oracle' else 'LoRA '}oracle": r["step"] for name, r in oracles.items()}
    for name, s in {**rows, **results["controls"]}.items():
        lo, hi = s["ci95_no_final"]
        print(f"  {name:<30} {s['exact']:>8.3f}   {s['exact_no_final']:.3f} [{lo:.3f}, {hi:.3f}]   "
              f"{s['operands']:>10.3f} {s['result']:>7.3f} {s['token_f1']:>7.3f}")
    print("  n = {n} readings, {n_no_final} without the final slot".format(**results["oracle"]["step"]))
    for name, r in oracles.items():
        print(f"  {name}: answer {show_rate(r['answer'])}, problem {show_rate(r['problem'])}")
    if "probes" in results:
        print("\nprobes (without the final slot)           " + "".join(f"{name:>8}" for name in PROBED))
        for kind, r in results["probes"].items():
            print(f"  {kind:<40}" + "".join(f"{r[name]['exact']:>8.3f}" for name in PROBED) + f"   n={r['step']['n']}")
    if "causal" in results:
        causal = results["causal"]
        print("\ndo the thoughts matter? answers kept with all of them replaced")
        for kind, r in causal["keep"].items():
            print(f"  {kind:<33} {show_rate(r):>27}")
        for name, whose in (("b", "the other's"), ("a", "its own")):
            print(f"  swap: the answer is {whose:<13} {show_rate(causal['interchange'][name]):>27}")
        for D, grid in causal["map"].items():
            print(f"{D} digits, one thought swapped: share of differing digits that become the other's, by column")
            for slot, row in enumerate(grid):
                print(f"  slot {slot}  " + " ".join(f"{math.nan if x is None else x:6.2f}" for x in row))
    print("\nfirst mistakes of the self-oracle")
    for m in results["oracle"]["mistakes"]:
        print(f"  {m['problem'] + ' slot ' + str(m['slot']):<24} is {m['step']:<26} read as {m['read']}")
    print(f"\n{results['seconds']['total']:.0f} s in all on {results['env']['device']}")

# -----------------------------------------------------------------------------------------------------------
# 12. Stages and command line
def export(run):
    """OUT/export/NAME of the coconut and each oracle, adapters merged, for transformers' from_pretrained."""
    cfg, text = run.cfg, run.text
    layers, heads, width = SIZES[cfg.model]
    config = {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "vocab_size": text.size, "n_layer": layers,
              "n_head": heads, "n_embd": width, "n_positions": cfg.positions, "activation_function": "gelu_new",
              "layer_norm_epsilon": 1e-5, "bos_token_id": text.eos, "eos_token_id": text.eos}
    bpe = released(cfg, gpt2_weights.BPE_FILES) if cfg.pretrained else None
    special = {name: text.ids(name)[0] for name in ("<|endoftext|>", *SPECIAL)}
    for name in ("coconut", "oracle", "lora"):
        if (run.out / f"{name}.safetensors").exists():
            model = load_model(run, name)
            weights = {key: w for key, w in model.state_dict().items() if ".lora_" not in key}
            for key, module in model.named_modules():
                if isinstance(module, Conv1D) and module.lora_scale:
                    weights[f"{key}.weight"] = module.weight + module.lora_a @ module.lora_b * module.lora_scale
            gpt2_weights.write_transformers(run.out / "export" / name, weights, config, bpe, text.pattern, special)
            print(f"exported {run.out / 'export' / name}")

PARTS = {"coconut": train_coconut, "probes": train_probes, "oracle": train_oracle, "lora": train_lora,
         "eval": evaluate}
NEEDS = {"probes": ("coconut",), "oracle": ("coconut",), "lora": ("coconut", "base"), "export": ("coconut",),
         "eval": ("coconut", "base", "probes", "oracle", "lora")}

def check(cfg, parts):
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
    refuse(cfg.device == "cuda" and not torch.cuda.is_available(),
           "--device cuda: torch finds no GPU: use --device cpu, or install a CUDA build of torch")
    refuse(4 * slots + slots * max(13, cfg.thoughts_per_slot) > cfg.positions,  # 13: longest step and <sep>
           f"{cfg.positions} positions do not hold {max(cfg.digits)} digits with {cfg.thoughts_per_slot} thoughts a "
           "slot: lower --digits or --thoughts-per-slot")
    refuse(cfg.resume and cfg.force, "--resume keeps finished parts and --force trains them again: choose one")
    refuse(cfg.resume and not (out / "config.json").exists(),
           f"--resume: there is no run in {out}: leave --resume out to start one")
    for need in NEEDS.get(cfg.stage, ()) if own else ():
        refuse(not done(need), f"--stage {cfg.stage} needs {out / need}.safetensors: "
               f"run --stage {'coconut' if need == 'base' else need} --out {out} first")
    measured = load_json(out / "results.json")
    for part in ("coconut", "probes") if cfg.stage == "eval" and own else ():  # these are measured as they are trained
        refuse(part not in measured, f"{out / 'results.json'} lacks the {part} part: restore it, or train with --force")
    found = [part for part in parts if done(part)] + ["last.pt"] * ("coconut" in parts and (out / "last.pt").exists())
    refuse(found and not cfg.resume and not cfg.force,
           f"{out} already has a run ({found and found[0]}): --resume goes on, --force trains it again, another --out "
           "keeps both")

def open_run(cfg, parts):
    """Make the directory, clear what is to be trained again, write config.json -> Run. Raises UserError."""
    out = Path(cfg.out)
    text = Text(read_bpe(released(cfg, gpt2_weights.BPE_FILES)) if cfg.pretrained else None, cfg.protocol == "seed")
    if "coconut" in parts and cfg.pretrained:
        released_weights(cfg, text)  # refuses a wrong file before anything is written
    try:
        out.mkdir(parents=True, exist_ok=True)
        if not cfg.resume:
            names = [f"{part}.safetensors" for part in ("base", *PARTS)] + ["last.pt", "results.json", "log.jsonl"]
            for name in names if "coconut" in parts else [f"{part}.safetensors" for part in parts]:
                (out / name).unlink(missing_ok=True)
        knobs = {k: v for k, v in dataclasses.asdict(cfg).items() if k not in SESSION}
        write_text(out / "config.json", json.dumps(knobs, indent=1) + "\n")
    except OSError as e:
        raise UserError(f"--out {out} cannot be written ({e.strerror}): choose another directory") from e
    return Run(cfg, text, out)

def main(argv=None):
    cfg = parse(argv)
    parts = list(PARTS) if cfg.stage == "all" else [cfg.stage]
    device = cfg.device if cfg.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    dtype = cfg.dtype if cfg.dtype != "auto" else "bfloat16" if device == "cuda" else "float32"
    cfg = dataclasses.replace(cfg, device=device, dtype=dtype,
                              compile=device == "cuda" if cfg.compile is None else cfg.compile)
    check(cfg, parts)
    run = open_run(cfg, parts)
    torch.set_float32_matmul_precision("high")
    size = sum(map(math.prod, shapes_of(cfg, run.text).values()))
    print(f"cocoracle {cfg.stage} | {cfg.model}, {size:,} parameters | {environment(cfg)['device']}, {cfg.dtype} | "
          f"digits {', '.join(map(str, cfg.digits))} | seed {cfg.seed} | {cfg.out}")
    if cfg.stage == "export":
        return export(run)
    for part in parts:
        if not (run.out / f"{part}.safetensors").exists():
            begin = time.time()
            PARTS[part](run)
            record(run, seconds={part: time.time() - begin})
    if "eval" in parts:
        seconds = load_json(run.out / "results.json")["seconds"]
        print_table(record(run, seconds={"total": sum(seconds[part] for part in PARTS if part in seconds)}))

if __name__ == "__main__":
    try:
        main()
    except (UserError, WeightsError) as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\ninterrupted: the same command with --resume goes on from the last checkpoint", file=sys.stderr)
        sys.exit(130)
