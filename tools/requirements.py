"""Print all that decides what is installed: an environment made from the same text is up to date.

usage: python tools/requirements.py [PACKAGE …]

Runs before there is an environment: with the standard library alone.
"""

from __future__ import annotations

import json
import sys
import tomllib
from pathlib import Path

project, command = (
    tomllib.loads(Path(folder, "pyproject.toml").read_text(encoding="utf-8"))
    for folder in (".", "loraplan")
)
lines = Path("constraints.txt").read_text(encoding="utf-8").splitlines()
decisive = {
    "projects": [project["project"], command["project"]],
    "build-system": project["build-system"],
    "setuptools": project["tool"]["setuptools"],
    "versions": [line for line in lines if line and not line.startswith("#")],
    "files": sys.argv[1:],
}
print(json.dumps(decisive, indent=1, sort_keys=True))
