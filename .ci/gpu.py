"""make gpu: correctness, speed and whole runs on a CUDA machine, as far as the time goes; again, and it goes on.

    python3 .ci/gpu.py DIRECTORY SECONDS
"""

import copy
import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(HERE))
import cocoracle as co  # noqa: E402

def losses(model, cfg, text):
    """Losses and one gradient of a text step, an all-thoughts step and an oracle step."""
    run, out = co.Run(replace(cfg, batch_size=16, whiten=False), text, Path(".")), {}
    batch_at = co.oracle_batches(run, model, co.TRAIN, "oracle", 16)
    def oracle(step, rows):
        prompts, targets, vectors = batch_at(step)
        return co.oracle_loss(run, model, prompts, targets, vectors[rows], rows)
    steps = {"text": lambda *a: co.coconut_step(run, model, a[0], 0, "check", 16, rows=a[1]),
             "thoughts": lambda *a: co.coconut_step(run, model, a[0], cfg.last, "check", 16, rows=a[1]), "oracle": oracle}
    for name, loss_of in steps.items():
        with co.amp(cfg, model):
            loss = loss_of(0, co.ALL)[0]
        loss.backward()
        out[name] = loss.item(), model.h[0].mlp.c_fc.weight.grad.float().cpu().clone()
        model.zero_grad()
    return out

def compare(title, found, wanted, tolerance):
    for name, (loss, gradient) in found.items():
        other, theirs = wanted[name]
        far = ((gradient - theirs).norm() / theirs.norm()).item()
        print(f"{title}, {name} step: loss {loss:.5f} against {other:.5f}, gradient off by {far:.2%}", flush=True)
        assert abs(loss - other) < tolerance * other and far < 4 * tolerance, "not the same"

def correctness(device="cuda", model="gpt2"):
    """The GPU against the CPU on tiny, then compiled bfloat16 against eager float32 on a model, on the GPU."""
    torch.backends.cuda.matmul.allow_tf32 = False
    text, eager = co.Text(), {"device": device, "model": model}
    for name, plain, fast, tolerance in (
            (f"tiny, {device} against cpu", {"device": "cpu"}, {"device": device}, 1e-3),
            (f"{model}, compiled bfloat16 against eager float32", eager,
             {**eager, "dtype": "bfloat16", "compile": True}, 2e-2)):
        cfg = replace(co.Config(dtype="float32", compile=False), init="scratch", **plain)
        model = co.new_model(co.Run(cfg, text, Path(".")))
        wanted = losses(model, cfg, text)
        cfg = replace(cfg, **fast)
        other = copy.deepcopy(model).to(cfg.device)
        for block in other.h if cfg.compile else ():
            block.compile()
        compare(name, losses(other, cfg, text), wanted, tolerance)
        print("graphs compiled so far:", torch._dynamo.utils.counters["stats"]["unique_graphs"], flush=True)

def call(out, end, *args):
    """One command of cocoracle.py, its output into OUT.txt; ended in time for a checkpoint. -> whether it finished."""
    if end - time.time() < 30:
        return False
    out.parent.mkdir(parents=True, exist_ok=True)
    with open(out.with_suffix(".txt"), "a") as log:
        process = subprocess.Popen([sys.executable, str(HERE / "cocoracle.py"), *args], stdout=log, stderr=log)
        try:
            process.wait(end - 20 - time.time())
        except subprocess.TimeoutExpired:
            process.terminate()  # it writes a checkpoint first
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
    print(f"{' '.join(args)}: {'done' if process.returncode == 0 else f'ended with {process.returncode}'}", flush=True)
    return process.returncode == 0

def main(folder, seconds):
    folder, end = Path(folder).absolute(), time.time() + float(seconds)
    folder.mkdir(parents=True, exist_ok=True)
    for model in ("gpt2", "gpt2-large"):
        done = folder / f"bench-{model}.done"
        if not done.exists():
            correctness(model=model)
            if call(folder / f"bench-{model}", end, "--stage", "bench", "--model", model, "--init", "scratch"):
                done.touch()
    for model in ("gpt2", "gpt2-large"):
        out = folder / model
        if json.loads((out / "results.json").read_text()).get("seconds", {}).get("eval") if (
                out / "results.json").exists() else False:
            continue
        resume = ["--resume"] if (out / "config.json").exists() else []
        if not call(out, end, "--model", model, "--init", "scratch", "--digits", "2-4", "--out", str(out), *resume):
            break

if __name__ == "__main__":
    if len(sys.argv) != 3 or not torch.cuda.is_available():
        sys.exit("error: python3 .ci/gpu.py DIRECTORY SECONDS, on a machine where torch finds a GPU")
    main(*sys.argv[1:])
