"""Speed of every kind of step, on the longest problems, beside the machine's own matrix product.

    python .scripts/bench.py --model gpt2 --init scratch --dtype bfloat16

With cocoracle.py's flags; `--thoughts plain` unless told. Seconds are of whole steps; FLOPs, of the
model alone; MFU, of the faster of the matrix products before and after, since a machine's speed
drifts. The oracle step is train_oracle's longest, without rehearsal.
"""

import dataclasses
import json
import sys
import time
from functools import partial
from pathlib import Path
from resource import RUSAGE_SELF, getrusage

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import cocoracle as co  # noqa: E402

BUDGET = 20.0  # seconds for what is timed, after its first three calls
SIDE = {"cuda": 8192, "cpu": 2048}  # of the matrices in the matrix product

def train(run, model, optimizers, loss_of, step):
    """A step on fresh problems; without optimizers, its gradients alone."""
    co.train_step(run, model, optimizers, "bench", step,
                  lambda step, rng: loss_of(run, model, rng=rng))

def oracle_loss(draw, run, model, rng):
    problems, works, readings = draw(0, rng, run.cfg.batch_size)
    questions, targets, rows, slots = co.draw_questions(run, rng, ["step"], problems, works)
    vectors = co.pick(readings, rows, slots)
    loss, right = co.oracle_loss(run, model, questions, targets, vectors)
    return co.Loss(loss, loss, right)

def answers(run, model, step):
    rng, (size,) = co.rng_of(run.cfg.seed, "bench", step), run.cfg.digits
    problems = run.task.draw(rng, co.TRAIN, size, run.cfg.batch_size)
    co.answer(run, model, *co.think_through(run, model, problems))

def seconds_of(device, call):
    """Median seconds of a warm call, and how much longer the first one took: compiling."""
    times = []
    while len(times) < 3 or len(times) < 13 and sum(times) < BUDGET:
        begin = time.perf_counter()
        call(len(times))
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    median = float(np.median(times[min(3, len(times) - 2):]))
    return median, times[0] - median

def matrix_product(cfg):
    """FLOP/s of the machine's own matrix product."""
    n = SIDE[cfg.device]
    a, b = torch.randn(2, n, n, device=cfg.device, dtype=getattr(torch, cfg.dtype))
    return 2 * n**3 / seconds_of(cfg.device, lambda _: a @ b)[0]

def work_of(model, call):
    """FLOPs of a call, and the positions that it runs through the model."""
    tokens, counter = [], FlopCounterMode(display=False)
    hook = model.register_forward_pre_hook(lambda _, args: tokens.append(args[0].shape[:2].numel()))
    with torch.compiler.set_stance("force_eager"), sdpa_kernel(SDPBackend.MATH), counter:
        call(0)
    hook.remove()
    model.zero_grad()
    return counter.get_total_flops(), sum(tokens)

def measure(run, model, peaks, loss_of=None):
    """One row of the table, of training or answers. One more matrix product is added to peaks."""
    cfg, gpu = run.cfg, run.cfg.device == "cuda"
    call = counted = partial(answers, run, model)
    if loss_of:
        call = partial(train, run, model, co.make_optimizers(run, model, cfg.recipes["text"]), loss_of)
        counted = partial(train, run, model, [], loss_of)
    if gpu:
        torch.cuda.reset_peak_memory_stats()
    seconds, first = seconds_of(cfg.device, call)
    used = torch.cuda.max_memory_allocated() if gpu else 1024 * getrusage(RUSAGE_SELF).ru_maxrss
    peaks.append(matrix_product(cfg))
    flops, tokens = work_of(model, counted)
    examples = cfg.batch_size * (cfg.accumulate if loss_of else 1)
    return {"examples/s": examples / seconds, "tokens/s": tokens / seconds, "seconds": seconds,
            "TFLOP": flops / 1e12, "MFU": flops / seconds / max(peaks[-2:]), "GB": used / 1e9,
            "compile s": first if cfg.compile else 0.0}

def main(argv):
    cfg = co.parse(["--thoughts", "plain", *argv, "--out", "/dev/null"])  # no run is looked at
    co.check(cfg)
    if not cfg.kind.latent:
        raise co.UserError("--thoughts none: choose thoughts")
    cfg = dataclasses.replace(cfg, digits=(max(cfg.digits),))
    run = co.open_run(cfg)
    one = run._replace(cfg=dataclasses.replace(cfg, batch_size=1, accumulate=16))
    peaks, model, steps = [matrix_product(cfg)], co.new_model(run), {}
    draw, thoughts = co.pool_of(run, model), partial(co.coconut_loss, stage="all")
    draw(0, co.rng_of(0), 1)  # fills it
    for name, run_of, loss_of in (
            ("text step", run, partial(co.coconut_loss, stage="0")),
            ("all-thoughts step", run, thoughts),
            ("one example at a time, 16 added up", one, thoughts),
            ("oracle step", run, partial(oracle_loss, draw)),
            ("answers", run, None)):
        steps[name] = measure(run_of, model, peaks, loss_of)
        if len(steps) == 1:
            print(" " * 36 + "".join(f"{unit:>11}" for unit in steps[name]))
        print(f"{name:<36}" + "".join(f"{x:>11.4g}" for x in steps[name].values()), flush=True)
    print(f"matrix product: {min(peaks) / 1e12:.3g} to {max(peaks) / 1e12:.3g} TFLOP/s")
    print(json.dumps({"config": dataclasses.asdict(cfg), "env": co.environment(cfg),
                      "matrix_product_flops": peaks, "steps": steps}))

if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except co.UserError as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
