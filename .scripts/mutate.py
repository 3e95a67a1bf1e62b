"""Mutants of cocoracle.py for mutants.py: one small change each to the syntax tree.

Operators of comparisons and arithmetic, `and` and `or`, integers one larger, slices shifted, named
arguments, masks and calls such as .detach() dropped, no_grad and its like left, statements removed.
"""

import ast
import os
import re
import zlib
from contextlib import contextmanager
from typing import NamedTuple

FIRST, LAST = 3, 11  # sections that mutants are drawn from
PAIRS = [("Eq", "NotEq"), ("Lt", "LtE"), ("Gt", "GtE"), ("Is", "IsNot"), ("In", "NotIn"),
         ("Add", "Sub"), ("Mult", "Div"), ("FloorDiv", "Mod"), ("And", "Or"), ("BitAnd", "BitOr")]
SWAPS = {"Pow": "Mult", "MatMult": "Mult", **dict(PAIRS), **{b: a for a, b in PAIRS}}
CALLS = ("detach", "roll", "masked_fill", "clamp", "clamp_min", "float", "double")
GUARDS = re.compile(r"no_grad|evaluating|precision")
MASKS = ("mask", "valid", "past", "given")  # become None

class Mutant(NamedTuple):
    """A place in the tree, and what stands there instead."""
    parent: ast.AST
    field: str
    index: int | None
    new: ast.AST | None
    statement: ast.stmt
    function: str

@contextmanager
def applied(mutant):
    """The tree with the change, for a while."""
    old, new = getattr(mutant.parent, mutant.field), mutant.new
    if mutant.index is not None:
        new = [*old[:mutant.index], *([new] if new else []), *old[mutant.index + 1:]]
    setattr(mutant.parent, mutant.field, new)
    yield
    setattr(mutant.parent, mutant.field, old)

def like(node, **fields):
    return type(node)(**{**dict(ast.iter_fields(node)), **fields})

def put(items, index, new):
    return [*items[:index], new, *items[index + 1:]]

def swapped(operator):
    return getattr(ast, SWAPS[type(operator).__name__])()

def expressions(node):
    """What may stand in an expression's place."""
    if type(getattr(node, "op", None)).__name__ in SWAPS:
        yield like(node, op=swapped(node.op))
    if isinstance(node, ast.Compare):
        for i, op in enumerate(node.ops):
            yield like(node, ops=put(node.ops, i, swapped(op)))
    if isinstance(node, ast.Constant) and type(node.value) is int:
        yield ast.Constant(node.value + 1)
    if isinstance(node, ast.keyword) and node.arg not in (None, "device"):  # tests have a CPU
        yield None
    if isinstance(node, ast.Call):
        if getattr(node.func, "attr", None) in CALLS:
            yield node.func.value
        for i, arg in enumerate(node.args):
            if isinstance(arg, ast.Name) and arg.id in MASKS:
                yield like(node, args=put(node.args, i, ast.Constant(None)))
    if isinstance(node, ast.Slice):
        for end, op in (("lower", ast.Add()), ("upper", ast.Sub())):
            bound = getattr(node, end)
            if bound and not isinstance(bound, (ast.Constant, ast.UnaryOp)):
                yield like(node, **{end: ast.BinOp(bound, op, ast.Constant(1))})

def statements(node, twice):
    """What may stand in a statement's place. twice: names that its function sets twice."""
    removed = isinstance(node, (ast.AugAssign, ast.Break, ast.Continue, ast.Raise))
    removed |= isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)
    removed |= isinstance(node, ast.If) and not node.orelse
    if isinstance(node, ast.Assign):
        names = [n for n in ast.walk(node.targets[0]) if isinstance(n, ast.Name)]
        removed |= all(type(n.ctx) is ast.Load or n.id in twice for n in names)
    if removed:
        yield ast.Pass()
    if isinstance(node, ast.With):
        kept = [item for item in node.items if not GUARDS.search(ast.unparse(item))]
        if kept != node.items:
            yield like(node, items=kept) if kept else ast.If(ast.Constant(True), node.body, [])

def silent(field, node):
    """Annotations, fields of a NamedTuple, docstrings, what is printed."""
    if field in ("annotation", "returns", "bases") or not isinstance(node, ast.AST):
        return True
    value = node.value if isinstance(node, ast.Expr) else None
    called = getattr(value, "func", None)
    return (isinstance(node, (ast.AnnAssign, ast.JoinedStr)) or isinstance(value, ast.Constant)
            or getattr(called, "id", "") in ("print", "log"))

def mutants(parent, statement=None, function="", twice=()):
    """Every mutant of a tree."""
    for field, value in ast.iter_fields(parent):
        for index, node in enumerate(value) if isinstance(value, list) else [(None, value)]:
            if silent(field, node):
                continue
            here = node if isinstance(node, ast.stmt) else statement
            found = statements(node, twice) if here is node else expressions(node)
            where, names = function, twice
            if field == "decorator_list":
                found = [None] * bool(GUARDS.search(ast.unparse(node)))
            for new in found:
                yield Mutant(parent, field, index, new, here, function)
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                where = f"{function}.{node.name}".lstrip(".")
            if isinstance(node, ast.FunctionDef):
                inner = [n for n in ast.walk(node) if isinstance(n, ast.Name)]
                stored = [n.id for n in inner if isinstance(n.ctx, ast.Store)]
                stored += [n.arg for n in ast.walk(node) if isinstance(n, ast.arg)]
                names = {name for name in stored if stored.count(name) > 1}
            if field != "decorator_list":
                yield from mutants(node, here, where, names)

def head(statement, whole=False):
    """A statement in one line; of one that has a body, what is before it."""
    lines = ast.unparse(ast.fix_missing_locations(statement)).splitlines()
    if whole or not hasattr(statement, "body"):
        return " ".join(lines)
    return next(line for line in lines if line and line[0] != "@")

def told(mutant):
    """`before -> after`, with a little of the statement around it."""
    before = head(mutant.statement, mutant.field == "decorator_list")
    if isinstance(mutant.new, ast.stmt):
        after = "removed" if isinstance(mutant.new, ast.Pass) else head(mutant.new)
        return f"{before} -> {after}"
    with applied(mutant):
        after = head(mutant.statement, mutant.field == "decorator_list")
    begin = max(0, len(os.path.commonprefix([before, after])) - 40)
    end = max(0, len(os.path.commonprefix([before[::-1], after[::-1]])) - 25)
    return f"{before[begin:len(before) - end]} -> {after[begin:len(after) - end]}"

def drawn(source, tree, seed, count):
    """{words: Mutant}, drawn by the words: a change of the program changes few of them."""
    section, sections, every = 1, {}, {}
    for line, words in enumerate(source.splitlines(), 1):
        title = re.match(r"# (\d+)\. ", words)
        sections[line] = section = int(title[1]) if title else section
    for mutant in mutants(tree):
        if FIRST <= sections[mutant.statement.lineno] <= LAST:
            key = f"{mutant.function}: {told(mutant)}"
            every[key + " (again)" * (key in every)] = mutant
    keys = sorted(every, key=lambda key: zlib.crc32(f"{seed} {key}".encode()))
    return {key: every[key] for key in keys[:count]}
