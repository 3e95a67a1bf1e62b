"""make mutants: do the tests notice when cocoracle.py is wrong?

    python .scripts/mutants.py [--seed 0] [--count 150] [--only NUMBER ...]

Mutants (mutate.py) are drawn at random over sections 3 to 11. First the unchanged program is
tested, to record which functions each test calls, in processes that it starts too. A mutant then
has the tests that call its function, the fastest first, in one process, until one fails; those of
the trained miniature only if all others pass. It is trained anew, unless its training does not call
the function: then it is evaluated anew, by the mutant. Far too slow is killed, too. All is kept in
runs/mutants: the same again goes on and, if tests were changed, tries again what survived. Without
that folder it begins anew. mutants.json tells why some survivors are no fault of the tests.
"""

import argparse
import ast
import json
import os
import shutil
import signal
import sys
import time
import zlib
from collections import Counter
from pathlib import Path

import pytest
from mutate import applied, drawn, recording, told

HOME = Path(__file__).resolve().parent.parent
WORK = HOME / "runs" / "mutants"
COPY, CALLED = WORK / "copy", WORK / "called"  # the program tested; what its processes called
TESTS = ("test_cocoracle.py", ".scripts/test_scripts.py")
SLOW = 30.0  # seconds of a test that mutants are spared

def load(path):
    return json.loads(path.read_text()) if path.exists() else {}

class Plugin:
    """Chooses, times and records tests. limits {test: seconds}, or None: all tests, recorded."""

    def __init__(self, limits=None, trained=False):
        self.limits, self.trained, self.tests, self.training = limits, trained, {}, []

    def pytest_collection_modifyitems(self, items):
        module = sys.modules["test_cocoracle"]
        self.cli, module.cli, self.mini = module.cli, self.run_cli, tuple(module.MINI)
        if self.limits is not None:
            order = list(self.limits)
            items[:] = [item for item in items if item.nodeid in order]
            items.sort(key=lambda item: order.index(item.nodeid))

    def called(self):
        files = [path.read_text().split() for path in CALLED.iterdir()]
        return sorted(set(sys.modules["cocoracle"]._called).union(*files))

    def run_cli(self, *args, **how):
        """cli() of the tests. But the miniature's training is recorded, or spared."""
        anew = self.limits is not None and not self.trained
        if args[:len(self.mini)] != self.mini or anew:
            return self.cli(*args, **how)
        out = args[-1]
        if self.trained:
            shutil.copytree(WORK / "trained", out)
        else:
            for stage in ("coconut", "probes", "lora"):
                knobs = self.mini if stage == "coconut" else ("--device", "cpu")
                self.cli(*knobs, "--stage", stage, "--out", out)
            self.training = self.called()
            shutil.copytree(out, WORK / "trained")
        return self.cli("--stage", "eval", "--out", out, "--device", "cpu")

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item):
        (WORK / "now").write_text(item.nodeid)
        if self.limits is not None:
            signal.alarm(int(self.limits[item.nodeid]))  # nobody handles it: the process ends
            return (yield)
        shutil.rmtree(CALLED, ignore_errors=True)
        CALLED.mkdir()
        sys.modules["cocoracle"]._called.clear()
        begin, done = time.time(), (yield)
        self.tests[item.nodeid] = {"seconds": time.time() - begin, "called": self.called(),
                                   "mini": "mini" in item.fixturenames}
        return done

def test(plugin):
    """Run tests in the copy, in this process, and end it."""
    os.setsid()
    os.chdir(COPY)
    sys.path[0] = str(COPY)
    os.environ.update(CALLED=str(CALLED), PYTHONDONTWRITEBYTECODE="1", OMP_NUM_THREADS="1")
    for stream in (1, 2):
        os.dup2(os.open(WORK / "output", os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    signal.alarm(0 if plugin.limits is None else 120)  # for what hangs while it is imported
    stop = [] if plugin.limits is None else ["-x"]
    code = pytest.main(["-q", "--tb=short", "-p", "no:cacheprovider", *stop,
                        f"--basetemp={WORK / 'tmp' / 'tmp'}", *TESTS], plugins=[plugin])
    if plugin.limits is None and code == 0:
        record = {"tests": plugin.tests, "training": plugin.training}
        (WORK / "record.json").write_text(json.dumps(record))
    os._exit(code)

def run(tree, plugin):
    """Test the program of this tree -> the exit code, negative after a signal; the last test."""
    (COPY / "cocoracle.py").write_text(ast.unparse(ast.fix_missing_locations(tree)))
    (WORK / "now").write_text("import")
    (WORK / "output").unlink(missing_ok=True)
    shutil.rmtree(WORK / "tmp", ignore_errors=True)
    (WORK / "tmp").mkdir()
    process = os.fork()
    if not process:
        test(plugin)
    code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    try:
        os.killpg(process, signal.SIGKILL)  # what the tests have started
    except ProcessLookupError:
        pass
    return code, (WORK / "now").read_text()

def attempt(tree, mutant, record, mini):
    """Run the tests that may notice a mutant, of untrained models or the miniature -> verdict, the
    test that noticed it."""
    function, training, limits = mutant.function, {*record["training"]}, {}
    known = training.union(*(entry["called"] for entry in record["tests"].values()))
    longest = max(entry["seconds"] for entry in record["tests"].values())  # it trains
    for name, entry in sorted(record["tests"].items(), key=lambda each: each[1]["seconds"]):
        # what is in no function concerns every test
        concerned = function in entry["called"] or function not in known and entry["called"]
        if concerned and entry["mini"] == mini and (mini or entry["seconds"] < SLOW):
            limits[name] = 60 + 4 * (longest if mini else entry["seconds"])
    code, name = 0, ""
    if limits:
        with applied(mutant):
            code, name = run(tree, Plugin(limits, function in known - training))
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
    if not (WORK / "record.json").exists() and run(recording(ast.parse(source)), Plugin())[0]:
        sys.exit(f"error: the unchanged program fails: see {WORK / 'output'}")
    record, done = load(WORK / "record.json"), load(WORK / "results.json")
    explained = load(HOME / ".scripts" / "mutants.json")
    version = zlib.crc32(b"".join((HOME / name).read_bytes() for name in TESTS))
    chosen = drawn(source, tree, args.seed, args.count)
    for mini in (False, True):
        for number, mutant in enumerate(chosen):
            key = f"{mutant.function}: {told(mutant)}"
            verdict, name, tests, _ = done.get(key, ("", "", version, 0))
            wanted = not args.only or number in args.only
            again = not verdict or verdict in ("left", "survived") and tests != version
            if wanted and key not in explained and (verdict == "left" if mini else again):
                begin = time.time()
                verdict, name = attempt(tree, mutant, record, mini)
                print(f"{number:>3} {verdict:<9} {key} | {name}", flush=True)
                done[key] = verdict, name, version, round(time.time() - begin)
                (WORK / "results.json").write_text(json.dumps(done, indent=1))
    for number, mutant in enumerate(chosen):
        key = f"{mutant.function}: {told(mutant)}"
        verdict, name = done.get(key, ("not tried", ""))[:2]
        if key in explained:
            verdict, name = "equivalent", explained[key]
        counts[verdict] += 1
        print(f"{number:>3} {verdict:<14} cocoracle.py:{mutant.statement.lineno} {key} | {name}")
    print(", ".join(f"{n} {verdict}" for verdict, n in counts.items()), "of", counts.total())

if __name__ == "__main__":
    main()
