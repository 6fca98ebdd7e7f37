"""Which modules of the package a chapter depends on."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import dependencies
import pytest
from conftest import CHAPTERS

# In a new process: run the imports of a chapter, then read off them all that the chapter reads.
LOAD = """
import ast, json, sys
from contextlib import suppress
from pathlib import Path

import dependencies

for chapter in map(Path, sys.argv[1:]):
    tree, names = ast.parse(dependencies.code(chapter)), {}
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    exec(compile(ast.Module(imports, []), chapter, "exec"), names)
    for first, *rest in dependencies.chains(tree):
        with suppress(KeyError, AttributeError):
            value = names[first]
            for name in rest:
                value = getattr(value, name)
print(json.dumps([name for name in sys.modules if name.partition(".")[0] == "lorapower"]))
"""
LAZY = "import lazy_loader\n\n__getattr__, *_ = lazy_loader.attach_stub(__name__, __file__)"


@pytest.mark.programs
@pytest.mark.sources("chapters/*.ipynb", "lorapower/**/*.py*", "tools/dependencies.py")
@pytest.mark.parametrize("number", [5, 14])
def test_a_chapter_depends_on_all_that_it_loads(number: int) -> None:
    chapter = CHAPTERS[number - 1]
    path = str(Path(dependencies.__file__).parent)
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", LOAD, chapter],
        env={"PYTHONPATH": f"{path}:{dependencies.ROOT}"},
        capture_output=True,
        check=True,
    )
    loaded = set(json.loads(run.stdout))
    assert {"lorapower.book.chapter", "lorapower.lowrank"} <= loaded
    assert loaded <= dependencies.modules(chapter)


@pytest.mark.parametrize(
    ("code", "reached"),
    [
        ("import lorapower", ""),
        ("from lorapower import wing", "wing"),
        ("from lorapower import wing as w\n\nw.Image()", "wing wing.images errors"),
        ("import lorapower\n\nlorapower.wing.common.x", "wing wing.common"),
        ("from lorapower import wing\n\nprint(dir(wing))", "wing wing.images wing.common errors"),
        ("from lorapower.wing import *", "wing wing.images wing.common errors"),
        ("from lorapower import Shown", "wing wing.images errors"),
        ("from lorapower.middle import wing\n\nwing.common", "middle wing wing.common"),
        ("def later():\n    from lorapower.wing import common", "wing wing.common"),
    ],
)
def test_a_lazy_package_loads_what_is_read_off_it(tmp_path: Path, code: str, reached: str) -> None:
    for name, text in {
        "__init__.py": LAZY,
        "__init__.pyi": "from . import wing as wing\nfrom .wing import Image as Shown",
        "errors.py": "",
        "middle.py": "from . import wing",
        "wing/__init__.py": LAZY,
        "wing/__init__.pyi": "from . import common as common\nfrom .images import Image as Image",
        "wing/common.py": "",
        "wing/images.py": "from .. import errors",
    }.items():
        path = tmp_path / "lorapower" / name
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_text(text)
    source = tmp_path / "source.py"
    source.write_text(code)
    expected = {"lorapower", *(f"lorapower.{name}" for name in reached.split())}
    assert dependencies.modules(source, tmp_path) == expected
