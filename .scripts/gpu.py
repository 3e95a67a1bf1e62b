"""On a CUDA machine: correctness, speed, and whole runs from scratch, as far as the time goes.

    python .scripts/gpu.py DIRECTORY SECONDS

What misses its tolerance, or fails, is told and recorded in DIRECTORY/checks.json, and the rest
goes on. The same again does what is not done yet.
"""

import json
import subprocess
import sys
import time
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import cocoracle as co  # noqa: E402

SIZES, SCRATCH = ("gpt2", "gpt2-large"), ("--init", "scratch", "--model")
PARTS = 4  # batches of 16 whose losses are compared; in some of them thoughts are exchanged
STEPS = {"text step": "0", "all-thoughts step": "all", "oracle step": None}  # name: stage
FLOAT32 = {"losses": 1e-4, "gradient": 1e-3}  # relative distance allowed of two devices
TIMES = 3  # compiled bfloat16 may be so many times as far from float32 as eager bfloat16 is

def note(folder, name, **numbers):
    """Record numbers under a name in checks.json, and print them."""
    checks = {**co.load_json(folder / "checks.json"), name: numbers}
    co.write_atomic(folder / "checks.json", json.dumps(checks, indent=1) + "\n")
    shown = ", ".join(f"{key} {number}" for key, number in numbers.items() if key != "ok")
    print(f"{'ok    ' if numbers['ok'] else 'FAILED'} {name}: {shown}", flush=True)

def done(folder, name):
    return co.load_json(folder / "checks.json").get(name, {}).get("ok", False)

def loss_of(run, model, stage, rng):
    if stage:
        return co.coconut_loss(run, model, stage, rng).total
    # thoughts as they are: whitening would blow up what rounding does to them
    problems = run.task.draw(rng, co.TRAIN, 3, run.cfg.batch_size)
    works = [run.task.work(problem) for problem in problems]
    questions, targets, rows, slots = co.draw_questions(run, rng, ["step", "slot"], problems, works)
    vectors = co.pick(co.readings_of(co.think_through(run, model, problems)[1]), rows, slots)
    return co.oracle_loss(run, model, questions, targets, vectors)[0]

def steps_of(size, device, dtype="float32", backend=None):
    """Losses (PARTS,) and one gradient of each step, at random weights, always the same ones."""
    cfg = co.Config(model=size, init="scratch", device=device, dtype=dtype, batch_size=16)
    run, steps = co.open_run(cfg), {}
    torch.set_float32_matmul_precision("highest")
    model = co.new_model(run)
    for block in model.h if backend else ():
        block.compile(backend=backend)
    for name, stage in STEPS.items():
        losses = []
        for part in range(PARTS):
            with co.precision(run, model):
                loss = loss_of(run, model, stage, co.rng_of(0, "check", part))
            loss.backward()
            losses.append(loss.item())
        gradient = model.h[0].mlp.c_fc.weight.grad.cpu()
        steps[name] = {"losses": torch.tensor(losses), "gradient": gradient}
        model.zero_grad()
    return steps

def distance(found, wanted):
    """Relative distances of the losses and of the gradient."""
    return {name: ((found[name] - x).norm() / x.norm()).item() for name, x in wanted.items()}

def compare(folder, title, found, wanted, limits):
    far = distance(found, wanted)
    note(folder, title, ok=all(far[name] <= limits[name] for name in far), far=far, limits=limits,
         losses=found["losses"].tolist(), wanted=wanted["losses"].tolist())

def correctness(device, size, folder, backend="inductor"):
    """The device against the CPU, on tiny; compiled bfloat16 against float32 -> graphs compiled."""
    here, there = steps_of("tiny", "cpu"), steps_of("tiny", device)
    for name in STEPS:
        compare(folder, f"tiny, {device} against cpu, {name}", there[name], here[name], FLOAT32)
    wanted, low = steps_of(size, device), steps_of(size, device, "bfloat16")
    torch._dynamo.config.fail_on_recompile_limit_hit = True  # never back to eager in silence
    torch._dynamo.utils.counters.clear()
    found = steps_of(size, device, "bfloat16", backend)
    far = {name: distance(low[name], wanted[name]) for name in STEPS}
    losses = max(each["losses"] for each in far.values())  # one alone may be close by luck
    for name in STEPS:
        limits = {"losses": TIMES * losses, "gradient": TIMES * far[name]["gradient"]}
        compare(folder, f"{size}, compiled bfloat16 against eager float32, {name}", found[name],
                wanted[name], limits)
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]

def command(folder, name, end, script, *flags):
    """Run a script, its output into NAME.txt, and end it in time."""
    begin, left = time.time(), end - time.time() - 20
    if left < 10 or done(folder, name):
        return
    with open(folder / f"{name}.txt", "a") as log:
        try:
            told = subprocess.run([sys.executable, HERE / script, *flags], stdout=log, stderr=log,
                                  timeout=left, check=False).returncode
        except subprocess.TimeoutExpired:
            told = "out of time"
    note(folder, name, ok=told == 0, exit=told, seconds=round(time.time() - begin, 1))

def main(folder, seconds):
    folder, end = Path(folder).absolute(), time.time() + float(seconds)
    folder.mkdir(parents=True, exist_ok=True)
    for size in SIZES:
        name = f"{size}, correctness"
        if not done(folder, name) and time.time() < end:
            try:
                note(folder, name, ok=True, graphs=correctness("cuda", size, folder))
            except Exception as e:  # a compiler raises anything
                note(folder, name, ok=False, error=repr(e))
        torch.cuda.empty_cache()
        command(folder, f"bench-{size}", end, "bench.py", *SCRATCH, size)
    for size in SIZES:
        flags = [*SCRATCH, size, "--out", folder / size]
        flags += ["--resume"] * (folder / size / "config.json").exists()
        command(folder, size, end, "../cocoracle.py", *flags)
    failed = [name for name in co.load_json(folder / "checks.json") if not done(folder, name)]
    print(f"recorded in {folder}/checks.json; failed: {', '.join(failed) or 'nothing'}")
    return int(failed != [])

if __name__ == "__main__":
    if len(sys.argv) != 3 or not torch.cuda.is_available():
        sys.exit("error: python .scripts/gpu.py DIRECTORY SECONDS, where torch finds a GPU")
    sys.exit(main(*sys.argv[1:]))
