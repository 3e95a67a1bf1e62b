"""make mutants: do the tests notice when cocoracle.py is wrong?

    python .scripts/mutants.py [--seed 0] [--count 150] [--only NUMBER ...]

Mutants (mutate.py) are drawn over sections 3 to 11, as if at random. First the unchanged program is
tested (trial.py), to record which functions each test calls, in processes that it starts too. A
mutant then has the tests that call its function, the fastest first, in one process, until one
fails; those of the trained miniature only for what is left. It is trained anew, unless its training
does not call the function: then the mutant evaluates a trained one. A test far too slow has failed,
too. All is kept in runs/mutants, and the same again goes on: new tests are recorded and, if any
changed, what survived is tried again. mutants.json tells why some are no fault of the tests.
"""

import argparse
import ast
import json
import shutil
import sys
import time
import zlib
from collections import Counter

from mutate import applied, drawn
from trial import COPY, HOME, WORK, Plugin, recording, run

def load(path, default):
    return json.loads(path.read_text()) if path.exists() else default

def attempt(tree, mutant, record, mini):
    """Run the tests of untrained models, or of the miniature -> killed, survived or, with the
    miniature to come, left; the test that noticed."""
    function, tests, limits = mutant.function, record["tests"], {}
    known = {name for entry in tests.values() for name in entry["called"]}
    longest = max(entry["seconds"] for entry in tests.values())  # that of training
    for name, entry in sorted(tests.items(), key=lambda each: each[1]["seconds"]):
        # what is in no function concerns every test, and who trained it, all tests of the miniature
        concerned = mini or function in entry["called"] or function not in known and entry["called"]
        if concerned and entry["mini"] == mini:
            limits[name] = 60 + 4 * (longest if mini else entry["seconds"])
    code, name = 0, ""
    if limits:
        anew = function in record["training"] or function not in known
        with applied(mutant):
            code, name = run(tree, Plugin(record, limits, anew))
    if code:
        return "killed" if code > 0 else "killed by time", name
    return "survived" if mini else "left", ""

def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=150)
    parser.add_argument("--only", type=int, nargs="*", metavar="NUMBER")
    args = parser.parse_args()
    WORK.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(COPY, ignore_errors=True)
    shutil.copytree(HOME, COPY, ignore=shutil.ignore_patterns(".venv", ".git", "runs"))
    source = (HOME / "cocoracle.py").read_text()
    tree, counts = ast.parse(source), Counter()
    import hypothesis, torch, transformers  # noqa: E401, F401  they take seconds: once for all
    files = [HOME / "test_cocoracle.py", *sorted(HOME.glob(".scripts/test_*.py"))]
    version = zlib.crc32(b"".join(path.read_bytes() for path in files))
    record = load(WORK / "record.json", {"tests": {}, "version": 0})
    if record["version"] != version:
        record["version"] = version
        if run(recording(ast.parse(source)), Plugin(record))[0] == 1:
            sys.exit(f"error: the unchanged program fails its tests: see {WORK / 'output'}")
        record = load(WORK / "record.json", record)
    done = load(WORK / "results.json", {})
    explained = load(HOME / ".scripts" / "mutants.json", {})
    chosen = drawn(source, tree, args.seed, args.count)
    for mini in (False, True):
        for number, (key, mutant) in enumerate(chosen.items()):
            verdict, _, tests, _ = done.get(key, ("", "", version, 0))
            again = not verdict or verdict in ("left", "survived") and tests != version
            wanted = key not in explained and (not args.only or number in args.only)
            if wanted and (verdict == "left" if mini else again):
                begin = time.time()
                verdict, name = attempt(tree, mutant, record, mini)
                done[key] = verdict, name, version, round(time.time() - begin)
                (WORK / "results.json").write_text(json.dumps(done, indent=1))
                print(f"{number:>3} {verdict:<14} {key} | {name}", flush=True)
    print()
    for number, (key, mutant) in enumerate(chosen.items()):
        verdict, name = done.get(key, ("not tried", ""))[:2]
        if key in explained:
            verdict, name = "equivalent", explained[key]
        counts[verdict] += 1
        print(f"{number:>3} {verdict:<14} cocoracle.py:{mutant.statement.lineno} {key} | {name}")
    print(", ".join(f"{n} {verdict}" for verdict, n in counts.items()), "of", counts.total())

if __name__ == "__main__":
    main()
