"""Tests of a changed cocoracle.py, in a copy and in a process of its own, for mutants.py."""

import ast
import inspect
import json
import os
import shutil
import signal
import sys
import time
import zlib
from pathlib import Path

import pytest

HOME = Path(__file__).resolve().parent.parent
WORK = HOME / "runs" / "mutants"
COPY, CALLED = WORK / "copy", WORK / "called"  # the program tested; what its processes called
RECORD = """
import atexit, os, torch
_called, _compiling = set(), torch.compiler.is_compiling
atexit.register(lambda: open(f"{os.environ['CALLED']}/{os.getpid()}", "w").write(" ".join(_called)))
"""

def recording(tree, function=""):
    """The tree, changed so that it notes which functions are called."""
    for node in ast.iter_child_nodes(tree):
        name = f"{function}.{getattr(node, 'name', '')}".lstrip(".")
        recording(node, name if isinstance(node, (ast.FunctionDef, ast.ClassDef)) else function)
    if isinstance(tree, ast.FunctionDef):
        tree.body[:0] = ast.parse(f"_compiling() or _called.add({function!r})").body
    elif isinstance(tree, ast.Module):
        tree.body[1:1] = ast.parse(RECORD).body
    return tree

def source_of(item):
    return zlib.crc32(inspect.getsource(item.function).encode())

class Plugin:
    """Chooses and orders tests, limits {test: seconds}; or records new and changed ones."""

    def __init__(self, record, limits=None, anew=True):
        self.record, self.limits, self.anew = record, limits, anew

    def pytest_collection_modifyitems(self, items):
        module = sys.modules["test_cocoracle"]
        self.cli, module.cli, self.mini = module.cli, self.run_cli, tuple(module.MINI)
        found, wanted = {item.nodeid: item for item in items}, self.limits
        if wanted is None:
            known = {name: entry["source"] for name, entry in self.record["tests"].items()}
            wanted = [name for name in found if known.get(name) != source_of(found[name])]
        items[:] = [found[name] for name in wanted if name in found]

    def called(self):
        files = [path.read_text().split() for path in CALLED.iterdir()]
        return sorted(set(sys.modules["cocoracle"]._called).union(*files))

    def run_cli(self, *args, **how):
        """cli() of the tests. But the miniature's training is recorded, or spared."""
        trained, out = WORK / "trained", args[-1]
        if args[:len(self.mini)] != self.mini or self.limits and self.anew:
            return self.cli(*args, **how)
        if self.limits is None:
            self.cli(*self.mini, "--stage", "coconut", "--out", out)
            for stage in ("probes", "lora"):
                self.cli("--stage", stage, "--out", out, "--device", "cpu")
            self.record["training"] = self.called()
            shutil.copytree(out, trained)
        else:
            shutil.copytree(trained, out)
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
        self.record["tests"][item.nodeid] = {
            "seconds": time.time() - begin, "called": self.called(),
            "mini": "mini" in item.fixturenames, "source": source_of(item)}
        return done

def test(plugin):
    """Run tests in the copy, in this process, and end it."""
    os.setsid()
    os.chdir(COPY)
    sys.path[0] = str(COPY)
    os.environ.update(CALLED=str(CALLED), PYTHONDONTWRITEBYTECODE="1", OMP_NUM_THREADS="1")
    for stream in (1, 2):
        os.dup2(os.open(WORK / "output", os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    signal.alarm(120 if plugin.limits else 0)  # for what hangs while it is imported
    code = pytest.main(["-q", "--tb=short", "-p", "no:cacheprovider", *["-x"] * bool(plugin.limits),
                        f"--basetemp={WORK / 'tmp' / 'tmp'}", "test_cocoracle.py", ".scripts"],
                       plugins=[plugin])
    if plugin.limits is None and code in (0, 5):  # all passed, or there are no new ones
        (WORK / "record.json").write_text(json.dumps(plugin.record))
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
