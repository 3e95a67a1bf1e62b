"""All kinds of thoughts over seeds, of as many steps -> compare.md (a table) and compare.json.

    python .scripts/compare.py FOLDER SEEDS JOBS [cocoracle.py's flags]

Seeds are 1 to SEEDS; JOBS runs go at once, a thread each. What is finished is left as it is, what
was stopped goes on, and the table is of what there is. Beside the kinds stands `random`: readers
(probes, LoRA) trained on the thoughts of a model with random weights, the honest baseline of all
that readers find.
"""

import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

HOME = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(HOME))
import cocoracle as co  # noqa: E402

ORDER = ("faithful", "explained", "plain", "bottleneck", "pause", "none", "random")
COLUMNS = {  # of the table: where in results.json
    "answers": "coconut stages all", "text after": "coconut text_after",
    "steps read": "oracle step exact_no_final", "either order": "oracle step either_order",
    "never read before": "oracle never_read exact_no_final", "result": "oracle step result",
    "LoRA": "lora step exact_no_final", "LoRA result": "lora step result",
    "linear probe": "probes linear step", "MLP probe": "probes mlp step",
    "MLP digit": "probes mlp digit", "skill after": "oracle skill_after",
    "no thought": "controls none exact_no_final", "noise": "controls random exact_no_final",
    "same slot": "controls shuffled_same_slot exact_no_final",
    "IIA changed": "causal iia_changed", "IIA flow": "causal iia_flow",
    "IIA same": "causal iia_same", "IIA two": "causal iia_two", "IIA three": "causal iia_three",
    "IIA other size": "causal iia_size", "said after": "causal said_after",
    "kept, mean thought": "causal keep mean", "text tokens": "cost text tokens",
    "text ms": "cost text seconds", "thoughts": "cost thoughts tokens",
    "thoughts ms": "cost thoughts seconds", "training s": "seconds coconut",
    "oracle s": "seconds oracle", "total s": "seconds total"}

def finished(out):
    return (out / "report.html").exists()

def start(out, *flags):
    """Run cocoracle.py in a process of one thread. A failed run raises."""
    with open(f"{out}.txt", "a") as log:
        subprocess.run([sys.executable, HOME / "cocoracle.py", "--out", out, *flags], stdout=log,
                       stderr=log, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})

def train(folder, kind, seed, flags):
    """One run, begun or gone on with, or left as it is. Raises UserError where it had other flags."""
    out, trained = folder / f"{kind}-{seed}", kind != "random"
    flags = ["--seed", str(seed), *flags, "--thoughts", kind if trained else "explained"]
    if not trained:
        flags += ["--train-text", "0", "--train-mixed", "0", "--train-latent", "0"]
    saved = co.load_json(out / "config.json")
    wanted = json.loads(json.dumps(co.parse([*flags, "--out", str(out)]).knobs))
    if saved and saved != wanted:
        raise co.UserError(f"{out} was trained with other flags: choose another folder")
    if not finished(out) and trained:
        start(out, *flags, *["--resume"] * bool(saved))
    elif not finished(out):
        shutil.rmtree(out, ignore_errors=True)
        start(out, *flags, "--stage", "coconut")
        shutil.copytree(folder / f"faithful-{seed}" / "base", out / "base", dirs_exist_ok=True)
        for stage in ("probes", "lora", "eval"):
            start(out, "--stage", stage)
    print(f"{out.name} is done", flush=True)

def figure(results, path):
    """The number at a path of results.json, or None; also of a rate of no cases."""
    for name in path.split():
        results = results.get(name, {}) if isinstance(results, dict) else {}
    if isinstance(results, dict) and not results.get("n", 0):
        return None
    found = results.get("exact") if isinstance(results, dict) else results
    return 1000 * found if found is not None and path.endswith(" seconds") else found

def summary(folder, kinds, seeds):
    """-> {kind: {column: {seed: figure}}}, of the runs that are finished."""
    table = {}
    for kind in kinds:
        done = {seed: co.load_json(folder / f"{kind}-{seed}" / "results.json")
                for seed in seeds if finished(folder / f"{kind}-{seed}")}
        for column, path in COLUMNS.items():
            found = {str(seed): figure(results, path) for seed, results in done.items()}
            found = {seed: number for seed, number in found.items() if number is not None}
            if found and (kind != "random" or column[:3] in ("LoR", "lin", "MLP")):
                table.setdefault(kind, {})[column] = found
    return table

def markdown(table):
    """A row for each figure, a column for each kind and its n seeds: mean (least–most, where they differ)."""
    seeds = {kind: max(map(len, columns.values())) for kind, columns in table.items()}
    lines = ["| | " + " | ".join(f"{kind}, n={n}" for kind, n in seeds.items()) + " |",
             "|---" * (len(table) + 1) + "|"]
    for column in COLUMNS:
        cells, digits = [], 3
        if column.split()[-1] in ("s", "ms", "tokens", "thoughts"):
            digits = 0 if column.endswith(" s") else 1
        for kind, columns in table.items():
            found = [*columns.get(column, {}).values()]
            if not found:
                cells.append("-")
                continue
            mean, least, most = (f"{x:.{digits}f}" for x in (sum(found) / len(found), min(found), max(found)))
            told = mean if least == most else f"{mean} ({least}–{most})"
            cells.append(told + f", n={len(found)}" * (len(found) != seeds[kind]))
        lines.append(f"| {column} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"

def main(folder, seeds, jobs, *flags):
    folder, seeds = Path(folder).absolute(), range(1, int(seeds) + 1)
    folder.mkdir(parents=True, exist_ok=True)
    kinds = [kind for kind in ORDER if kind in os.environ.get("KINDS", " ".join(ORDER)).split()]
    with ThreadPoolExecutor(int(jobs)) as pool:
        runs = []
        for seed in seeds:
            runs += [pool.submit(train, folder, kind, seed, flags) for kind in kinds if kind != "random"]
        wait(runs)  # random ones take the base of faithful ones
        runs += [pool.submit(train, folder, "random", seed, flags) for seed in seeds if "random" in kinds]
    failed = [run.exception() for run in runs if run.exception()]
    table = summary(folder, ORDER, seeds)
    done = [folder / f"{kind}-{seed}" / "results.json" for kind in ORDER for seed in seeds]
    versions = {co.load_json(path)["env"]["git"] for path in done if finished(path.parent)}
    told = markdown(table) + f"\nMeasured by: {', '.join(sorted(versions))}\n"
    co.write_atomic(folder / "compare.json", json.dumps(table, indent=1) + "\n")
    co.write_atomic(folder / "compare.md", told)
    print(told)
    for error in failed:
        print(f"error: {error}", file=sys.stderr)
    return int(bool(failed))

if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
