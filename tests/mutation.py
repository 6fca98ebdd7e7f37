"""Change the modules that proofs and certificates rest on, and ask whether the tests notice.

``python tests/mutation.py`` draws mutants, runs the tests of each one's module, and writes down in
``killed.csv`` which of them are killed, that is, fail a test. ``--again`` runs these once more:
each must be killed still, unless its statement is gone.
"""

from __future__ import annotations

import ast
import csv
import gc
import os
import random
import resource
import sys
import time
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import CodeType, FunctionType
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE, LIST = ROOT / "lorapower", ROOT / "tests" / "killed.csv"
# Modules, and the tests that are to notice their mutants.
SUITES = {
    "lowrank": ["test_lowrank", "test_linear", "test_front_doors"],
    "regression": ["test_regression", "test_front_doors"],
    "networks/gap": ["test_gap", "test_linear", "test_front_doors"],
    "networks/segmentation": ["test_gap", "test_transformer"],
    "constructions/linear": ["test_linear", "test_front_doors"],
    "constructions/fnn": ["test_fnn", "test_front_doors"],
    "constructions/_heads": ["test_transformer", "test_front_doors"],
    "checkpoints/_limits": ["test_certainty"],
}
PER_MODULE = 25
FAILED = 99  # what a process leaves with where a test fails

_PAIRS = [
    (ast.Lt, ast.LtE),
    (ast.Gt, ast.GtE),
    (ast.Eq, ast.NotEq),
    (ast.Is, ast.IsNot),
    (ast.In, ast.NotIn),
    (ast.Add, ast.Sub),
    (ast.Mult, ast.Div),
    (ast.And, ast.Or),
    (ast.BitAnd, ast.BitOr),
]
_OTHER: dict[type, type] = {one: other for a, b in _PAIRS for one, other in ((a, b), (b, a))}
_NAMES = {"min": "max", "any": "all", "amin": "amax", "minimum": "maximum"}
_NAMES |= {other: one for one, other in _NAMES.items()}


class Mutant(NamedTuple):
    """Say what is changed: a statement, or the head of one, in a function of a module."""

    module: str
    function: str
    statement: str
    change: str


@cache
def statements(path: Path) -> dict[tuple[str, str], ast.stmt | ast.expr]:
    """Find what one mutant changes, by function and text, where the function has it once."""
    found: dict[tuple[str, str], ast.stmt | ast.expr] = {}
    times: Counter[tuple[str, str]] = Counter()
    functions = []
    for node in ast.parse(path.read_bytes()).body:
        if isinstance(node, ast.FunctionDef):
            functions.append((node.name, node))
        elif isinstance(node, ast.ClassDef):
            methods = (each for each in node.body if isinstance(each, ast.FunctionDef))
            functions += [(f"{node.name}.{method.name}", method) for method in methods]
    for name, function in functions:
        for inner in ast.walk(function):
            part: ast.stmt | ast.expr | None = None
            match inner:
                case ast.If() | ast.While():
                    part = inner.test
                case ast.For():
                    part = inner.iter
                case ast.AnnAssign():
                    part = inner.value
                case ast.Assign() | ast.AugAssign() | ast.Return() | ast.Raise() | ast.Expr():
                    part = inner
            if part:
                key = name, ast.unparse(part)
                times[key] += 1
                found[key] = part
    return {key: part for key, part in found.items() if times[key] == 1}


def replacements(node: ast.AST) -> Iterator[ast.AST]:
    """Propose what could stand in place of a node."""
    match node:
        case ast.Compare(left, [op], [right]):
            yield ast.Compare(left, [_OTHER[type(op)]()], [right])
            if isinstance(op, ast.Lt | ast.LtE | ast.Gt | ast.GtE):
                yield ast.Compare(right, [op], [left])
        case ast.BinOp(left, op, right):
            if type(op) in _OTHER:
                yield ast.BinOp(left, _OTHER[type(op)](), right)
            if isinstance(op, ast.Sub | ast.Div | ast.FloorDiv | ast.MatMult | ast.Pow):
                yield ast.BinOp(right, op, left)
        case ast.BoolOp(op, values):
            yield ast.BoolOp(_OTHER[type(op)](), values)
        case ast.UnaryOp(_, operand) | ast.Attribute(operand, "mT"):
            yield operand
        case ast.Constant(bool(value)):
            yield ast.Constant(not value)
        case ast.Constant(int(value)):
            yield ast.Constant(value + 1)
            if value:
                yield ast.Constant(value - 1)
        case ast.Constant(float(value)):
            yield ast.Constant(2 * value or 1.0)
        case ast.Name(name) if name in _NAMES:
            yield ast.Name(_NAMES[name])
        case ast.Attribute(value, name) if name in _NAMES:
            yield ast.Attribute(value, _NAMES[name])
        case ast.Call(function, [first, second, *rest], keywords):
            # Of these the order does not matter.
            if ast.unparse(function).rpartition(".")[2] not in _NAMES:
                yield ast.Call(function, [second, first, *rest], keywords)
        case ast.Raise() | ast.AugAssign() | ast.Expr(ast.Call()):
            yield ast.Pass()
        case ast.Return(value) if value is not None:
            yield ast.Return(ast.Constant(None))


class _Swap(ast.NodeTransformer):
    def __init__(self, old: ast.AST, new: ast.AST) -> None:
        self.old, self.new = old, new

    def visit(self, node: ast.AST) -> ast.AST:
        return self.new if node is self.old else self.generic_visit(node)


def changes(statement: ast.AST) -> Iterator[str]:
    """Change a statement at one node, in every way."""
    for node in [*ast.walk(statement)]:
        for new in replacements(node):
            changed = _Swap(node, new).visit(statement)
            yield ast.unparse(changed)
            _Swap(new, node).visit(changed)


def draw() -> list[Mutant]:
    """Draw mutants of each module, of one statement each, the same ones from the same source."""
    drawn = []
    for module in SUITES:
        choose = random.Random(module)
        mutants = []
        for (function, text), part in statements(PACKAGE / f"{module}.py").items():
            if options := sorted({*changes(part)} - {text}):
                mutants.append(Mutant(module, function, text, choose.choice(options)))
        drawn += choose.sample(mutants, min(PER_MODULE, len(mutants)))
    return drawn


def code_within(code: CodeType) -> Iterator[CodeType]:
    """Walk through a code object and all within it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from code_within(constant)


def compiled(mutant: Mutant) -> CodeType | None:
    """Compile the changed function, in its module or another to which it has moved, if any."""
    # Interpreters differ in how they write a tree out.
    key = mutant.function, ast.unparse(ast.parse(mutant.statement))
    for path in (PACKAGE / f"{mutant.module}.py", *sorted(PACKAGE.rglob("*.py"))):
        if path.exists() and (part := statements(path).get(key)):
            lines = path.read_bytes().splitlines(keepends=True)
            first, last = part.lineno - 1, (part.end_lineno or 0) - 1
            before = b"".join(lines[:first]) + lines[first][: part.col_offset]
            after = lines[last][part.end_col_offset :] + b"".join(lines[last + 1 :])
            new = mutant.change if isinstance(part, ast.stmt) else f"({mutant.change})"
            module = compile(before + new.encode() + after, path, "exec", dont_inherit=True)
            return next(c for c in code_within(module) if c.co_qualname == mutant.function)
    return None


def place(code: CodeType) -> tuple[str, str]:
    """Say where code is from."""
    return code.co_filename, code.co_qualname


class Plugin:
    """Run the collected tests once as they are, then in a process of its own for each mutant."""

    def __init__(self, mutants: list[Mutant]) -> None:
        self.mutants = mutants
        self.results: dict[Mutant, str] = {}

    @pytest.hookimpl(tryfirst=True)
    def pytest_configure(self) -> None:
        """Look at few examples, always the same ones, and shrink none."""
        from hypothesis import Phase, settings  # after pytest, whose plugin it is

        phases = Phase.explicit, Phase.generate
        few = settings(deadline=None, database=None, phases=phases, max_examples=5)
        settings.register_profile("mutation", few)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        seconds = {item: self.run(session, [item]) for item in session.items}
        if session.testsfailed:
            raise session.Failed("the tests must pass without a mutant")
        # Something that only looks like a function may warn when it is asked.
        functions = [each for each in gc.get_objects() if type(each) is FunctionType]
        gc.freeze()  # the processes share what stays as it is
        for mutant in self.mutants:
            code = compiled(mutant)
            items = [i for i in session.items if i.path.stem in SUITES[mutant.module]]
            items.sort(key=lambda item: seconds[item])
            if code is None:
                self.results[mutant] = "gone"
            elif pid := os.fork():
                status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                if status > 0 and status != FAILED:
                    raise RuntimeError(f"the tests of {mutant} could not be run")
                self.results[mutant] = "killed" if status else "survived"
            else:
                limit = round(10 + 5 * sum(seconds[item] for item in items))
                resource.setrlimit(resource.RLIMIT_CPU, (limit, limit + 1))
                os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
                os.dup2(1, 2)
                held = [f for f in functions if place(f.__code__) == place(code)]
                assert held, "the function has been imported"
                for function in held:
                    function.__code__ = code
                self.run(session, items)
                os._exit(FAILED if session.testsfailed else 0)
            print(self.results[mutant], *mutant[:2], mutant.change, sep=" | ", flush=True)
        return True

    def run(self, session: pytest.Session, items: list[pytest.Item]) -> float:
        """Run tests up to the first that fails, and measure the seconds of the processor."""
        start = time.process_time()
        for item, following in zip(items, [*items[1:], None], strict=True):
            session.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
            if session.testsfailed:
                break
        return time.process_time() - start


def main(again: bool) -> int:
    """Run mutants; with ``again`` fail unless every one of the list is killed or gone."""
    if again:
        with LIST.open(encoding="utf-8", newline="") as file:
            mutants = [Mutant(*row) for row in [*csv.reader(file)][1:]]
    else:
        mutants = draw()
    names = {name for mutant in mutants for name in SUITES[mutant.module]}
    files = [str(file) for file in sorted(ROOT.glob("tests/*/*.py")) if file.stem in names]
    options = "-q -s -p no:cacheprovider -p no:xdist --tb=no --hypothesis-profile=mutation"
    options += f" --hypothesis-seed=1 --rootdir={ROOT}"
    plugin = Plugin(mutants)
    if code := pytest.main([*options.split(), *files], plugins=[plugin]):
        return int(code)
    print(Counter(plugin.results.values()))
    killed = [mutant for mutant in mutants if plugin.results[mutant] == "killed"]
    if again:
        return int("survived" in plugin.results.values())
    with LIST.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([Mutant._fields, *sorted(killed)])
    return 0


if __name__ == "__main__":
    sys.exit(main("--again" in sys.argv[1:]))
