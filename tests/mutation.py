"""Make the mistakes of ``killed.csv`` in modules that proofs and certificates rest on.

``python tests/mutation.py [MODULE…]`` makes them one by one, of all modules or of these, and runs
the tests of the module: each mistake must be killed, that is, fail a test. They were drawn from all
small changes of a statement; any other may be added. Where its statement is gone a mistake is, too.
"""

from __future__ import annotations

import ast
import csv
import gc
import os
import re
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import CodeType, FunctionType
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
# Modules, and the tests that are to notice their mutants.
SUITES = {
    "lowrank": ["test_lowrank", "test_linear", "test_front_doors"],
    "regression": ["test_regression", "test_front_doors"],
    "networks/gap": ["test_gap", "test_linear", "test_front_doors"],
    "networks/segmentation": ["test_transformer", "test_residual", "test_front_doors"],
    "networks/transformer": ["test_transformer", "test_residual", "test_front_doors"],
    "constructions/linear": ["test_linear", "test_front_doors"],
    "constructions/fnn": ["test_fnn", "test_front_doors"],
    "constructions/_heads": ["test_transformer", "test_front_doors"],
    "checkpoints/_limits": ["test_certainty"],
}
FAILED = 99  # what a process leaves with where a test fails


class Mutant(NamedTuple):
    """Say what is changed: a statement, or the head of one, in a function of a module."""

    module: str
    function: str
    statement: str
    change: str

    def compiled(self) -> CodeType | None:
        """Compile the changed function, if it still has the statement, once."""
        path = ROOT / "lorapower" / f"{self.module}.py"
        tree = ast.parse(path.read_bytes())
        within: ast.Module | ast.ClassDef = tree
        *classes, name = self.function.split(".")
        for one in classes:
            named = [n for n in within.body if isinstance(n, ast.ClassDef) and n.name == one]
            if not named:
                return None
            within = named[0]
        # Interpreters differ in how they write a tree out.
        statement = ast.unparse(ast.parse(self.statement))
        for place, node in enumerate(within.body):
            if isinstance(node, ast.FunctionDef) and node.name == name:
                parts = re.split(rf"(?<!\w){re.escape(statement)}(?!\w)", ast.unparse(node))
                if len(parts) == 2:
                    within.body[place] = ast.parse(self.change.join(parts)).body[0]
                    module = compile(tree, path, "exec")
                    return next(c for c in code_within(module) if c.co_qualname == self.function)
        return None


def code_within(code: CodeType) -> Iterator[CodeType]:
    """Walk through a code object and all within it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from code_within(constant)


class Plugin:
    """Run the collected tests once as they are, then in a process of its own for each mutant."""

    def __init__(self, mutants: list[Mutant]) -> None:
        self.mutants = mutants
        self.results: list[str] = []

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
            code = mutant.compiled()
            items = [i for i in session.items if i.path.stem in SUITES[mutant.module]]
            items.sort(key=lambda item: seconds[item])
            if code is None:
                self.results.append("gone")
            elif pid := os.fork():
                status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                if status > 0 and status != FAILED:
                    raise RuntimeError(f"the tests of {mutant} could not be run")
                self.results.append("killed" if status else "survived")
            else:
                limit = round(10 + 5 * sum(seconds[item] for item in items))
                resource.setrlimit(resource.RLIMIT_CPU, (limit, limit + 1))
                os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
                os.dup2(1, 2)
                held = [f for f in functions if f.__code__.co_qualname == mutant.function]
                held = [f for f in held if f.__code__.co_filename == code.co_filename]
                assert held, "the function has been imported"
                for function in held:
                    function.__code__ = code
                self.run(session, items)
                os._exit(FAILED if session.testsfailed else 0)
            print(self.results[-1], *mutant[:2], mutant.change, sep=" | ", flush=True)
        return True

    def run(self, session: pytest.Session, items: list[pytest.Item]) -> float:
        """Run tests up to the first that fails, and measure the seconds of the processor."""
        start = time.process_time()
        for item, following in zip(items, [*items[1:], None], strict=True):
            session.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
            if session.testsfailed:
                break
        return time.process_time() - start


def main(modules: list[str]) -> int:
    """Run the mutants of these modules, or of all; fail unless every one is killed or gone."""
    with (ROOT / "tests" / "killed.csv").open(encoding="utf-8", newline="") as file:
        mutants = [Mutant(*row) for row in [*csv.reader(file)][1:]]
    mutants = [mutant for mutant in mutants if mutant.module in (modules or SUITES)]
    names = {name for mutant in mutants for name in SUITES[mutant.module]}
    os.environ["OMP_NUM_THREADS"] = "1"  # a forked process has no others, and would wait for them
    files = [str(file) for file in sorted(ROOT.glob("tests/*/*.py")) if file.stem in names]
    options = "-q -s -p no:cacheprovider -p no:xdist --tb=no --hypothesis-profile=mutation"
    options += f" --hypothesis-seed=1 --rootdir={ROOT}"
    plugin = Plugin(mutants)
    if code := pytest.main([*options.split(), *files], plugins=[plugin]):
        return int(code)
    return int("survived" in plugin.results)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
