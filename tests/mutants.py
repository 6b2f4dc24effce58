"""Change one operator, constant or statement of the library at a time, at random; list what no test notices.

Samples are drawn here because mutmut and cosmic-ray run every mutant against one test command, and mutatest,
which samples, stops at Python 3.8. A survivor is a hole in the tests, or a change without effect.

    python tests/mutants.py 40 7                          # 40 mutants, seed 7
    python tests/mutants.py 40 7 formats nn/sparse.py     # of these folders and files of the package
"""

from __future__ import annotations

import argparse
import ast
import difflib
import os
import random
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from copy import copy
from pathlib import Path

from faults import FAULTS
from planted import REPOSITORY, TESTS, Fault, caught_by, import_once

PACKAGE = REPOSITORY / "mumoe_tensor"
DISTANT = ("benchmarks", "docs", "figures")  # tests that would take long for each survivor
TIMEOUT = 1800  # seconds: a mutant may loop for ever

OPERATORS: dict[type, type] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.And: ast.Or,
    ast.Or: ast.And, ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add, ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult, ast.Mod: ast.FloorDiv, ast.Pow: ast.Mult,
}  # fmt: skip


def changed(node: ast.AST, **fields: object) -> ast.AST:
    """A copy of a node with other fields."""
    other = copy(node)
    vars(other).update(fields)
    return other


def mutations(node: ast.AST) -> Iterator[ast.AST]:
    """What to put in the place of a node."""
    match node:
        case ast.Compare(ops=[op]) if type(op) in OPERATORS:
            yield changed(node, ops=[OPERATORS[type(op)]()])
        case ast.BinOp(op=op) | ast.BoolOp(op=op) | ast.AugAssign(op=op) if type(op) in OPERATORS:
            yield changed(node, op=OPERATORS[type(op)]())
        case ast.BinOp(op=ast.MatMult()):
            yield changed(node, left=node.right, right=node.left)
        case ast.UnaryOp(op=ast.Not() | ast.USub(), operand=operand):
            yield operand
        case ast.Constant(value=bool(value)):
            yield changed(node, value=not value)
        case ast.Constant(value=int() | float()):
            yield from (changed(node, value=node.value + step) for step in (-1, 1))
        case ast.Call(args=[first, second, *rest]) if not isinstance(first, ast.Starred):
            yield changed(node, args=[second, first, *rest])
        case ast.Return(value=ast.expr()):
            yield changed(node, value=None)
        case ast.Expr(value=ast.Call()) | ast.Assign() | ast.AugAssign() | ast.Raise():
            yield ast.Pass()
    if isinstance(node, (ast.If, ast.IfExp, ast.While)):
        yield changed(node, test=ast.UnaryOp(ast.Not(), node.test))


def code(node: ast.AST) -> Iterator[ast.AST]:
    """The nodes that run; no f-strings, whose places Python 3.11 does not know, and not `strict` of zip."""
    yield node
    is_left_out = isinstance(node, ast.JoinedStr) or (isinstance(node, ast.keyword) and node.arg == "strict")
    for name, value in ast.iter_fields(node):
        if is_left_out or name in ("annotation", "returns", "decorator_list"):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST):
                yield from code(child)


def sites(path: Path) -> list[tuple[Path, ast.AST, ast.AST]]:
    """Every mutant of a file: its path, a node, and what to put in its place."""
    actual = []
    for node in code(ast.parse(path.read_text())):
        for new in mutations(node):
            # A statement with a body changes in its condition alone.
            pair = (node.test, new.test) if isinstance(node, (ast.If, ast.While)) else (node, new)
            actual.append((path, *pair))
    return actual


def planted(path: Path, old: ast.AST, new: ast.AST) -> Fault:
    """The mutant as a fault: the whole file is replaced."""
    source = path.read_text()
    content, lines = source.encode(), source.encode().splitlines(keepends=True)
    start = sum(map(len, lines[: old.lineno - 1])) + old.col_offset
    end = sum(map(len, lines[: old.end_lineno - 1])) + old.end_col_offset
    written = ast.unparse(ast.fix_missing_locations(new))
    written = f"({written})" if isinstance(new, ast.expr) else written
    mutant = (content[:start] + written.encode() + content[end:]).decode()
    file = str(path.relative_to(REPOSITORY))
    return Fault(
        f"{file}:{old.lineno}:{old.col_offset} {written[:20]!r}", file, source, mutant, tests_of(file)
    )


def tests_of(file: str) -> str:
    """Names of a file's tests: the mirror of it, those that see a fault in it, then all of its folder."""
    room = Path(file).relative_to("mumoe_tensor").with_suffix("")
    folder = TESTS / room.parts[0] if (TESTS / room.parts[0]).is_dir() else TESTS
    inside = sorted({*folder.glob("test_*.py")} - {TESTS / f"test_{name}.py" for name in DISTANT})
    paths = [TESTS / room.parent / f"test_{room.name}.py", TESTS / f"test_{room.parts[0]}.py"]
    near = [name_of(path) for path in paths if path.exists()]
    seen = [name.partition("::")[0] for fault in FAULTS if fault.file == file for name in fault.tests.split()]
    return " ".join(dict.fromkeys([*near, *seen, *map(name_of, inside)]))


def name_of(test: Path) -> str:
    """The name that a fault has for a file of tests."""
    name = str(test.relative_to(TESTS).with_suffix(""))
    return name if "/" in name else name.removeprefix("test_")


def main() -> None:
    """Run a sample of mutants, and print the survivors."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("number", type=int)
    parser.add_argument("seed", type=int)
    parser.add_argument("places", nargs="*", default=["."], help="folders and files of the package")
    chosen = parser.parse_args()
    places = [PACKAGE / place for place in chosen.places]
    files = sorted({file for x in places for file in ([x] if x.suffix else x.rglob("*.py"))})
    every = [site for file in files for site in sites(file)]
    sample = random.Random(chosen.seed).sample(every, min(chosen.number, len(every)))
    print(f"{len(sample)} of {len(every)} mutants of {len(files)} files, seed {chosen.seed}", flush=True)
    survived = 0
    import_once()
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        faults = [planted(*site) for site in sample]
        caught = pool.map(lambda fault: caught_by(fault, Path(folder), TIMEOUT), faults)
        for fault, test in zip(faults, caught, strict=True):
            print(f"{fault.name:<60} {test or 'SURVIVED'}", flush=True)
            if not test:
                survived += 1
                diff = difflib.unified_diff(fault.old.splitlines(), fault.new.splitlines(), n=0, lineterm="")
                print("\n".join(f"    {line}" for line in [*diff][3:]), flush=True)
    print(f"{survived} of {len(sample)} mutants survived")


if __name__ == "__main__":
    main()
