"""make shape: lines, columns, characters, functions and comments of the files, beside their budgets."""

import ast
import statistics
import tokenize
from pathlib import Path

BUDGETS = {  # most lines, columns, characters
    "cocoracle.py": (1600, 100, 80_000), "gpt2_weights.py": (330, 120, 25_000),
    "test_cocoracle.py": (1500, 120, 100_000), "README.md": (200, 120, 18_000)}
LOOPS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


def docstring_lines(tree):
    lines = 0
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node):
            lines += node.body[0].end_lineno - node.body[0].lineno + 1
    return lines


def nested(tree):
    found = 0
    for node in ast.walk(tree):
        if isinstance(node, LOOPS):
            inner = [n for n in ast.walk(node) if isinstance(n, LOOPS)]
            found += len(inner) > 1 or len(node.generators) > 1
    return found


def main():
    home = Path(__file__).resolve().parent.parent
    for name, (lines_most, columns_most, characters_most) in BUDGETS.items():
        text = (home / name).read_text(encoding="utf-8")
        lines = text.splitlines()
        wide = sum(len(line) > columns_most for line in lines)
        print(f"{name}: {len(lines)} lines of {lines_most}, {len(text):,} characters of "
              f"{characters_most:,}, {wide} beyond {columns_most} columns")
        if name == "cocoracle.py":
            tree = ast.parse(text)
            sizes = sorted(node.end_lineno - node.lineno + 1 for node in ast.walk(tree)
                           if isinstance(node, ast.FunctionDef))
            with open(home / name, "rb") as file:
                tokens = list(tokenize.tokenize(file.readline))
            told = docstring_lines(tree) + sum(t.type == tokenize.COMMENT for t in tokens)
            filled = sum(bool(line.strip()) for line in lines)
            print(f"  functions: median {statistics.median(sizes)} lines (8 to 15), longest "
                  f"{sizes[-1]} (60); nested comprehensions {nested(tree)}; comments and "
                  f"docstrings {100 * told / filled:.0f}% (22 to 32)")


if __name__ == "__main__":
    main()
