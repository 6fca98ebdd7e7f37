"""The command ``lorapower``, which is also ``python -m lorapower``."""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec

_LIBRARIES = ("pandas", "peft", "rich", "transformers", "typer")


def main() -> None:
    """Run the command, or say which libraries it lacks, with exit status 2."""
    # Before anything imports torch: its threads spin while they wait, and take the time of others.
    # A pass of 0.7 s with one thread takes 9.8 s with two beside two busy processes, and 0.6 s so.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if missing := [name for name in _LIBRARIES if find_spec(name) is None]:
        remedy = "install the extra `checkpoints` (pip install 'lorapower[checkpoints]')"
        print(f"error: there is no {', no '.join(missing)}: {remedy}", file=sys.stderr)
        raise SystemExit(2)
    try:
        from .checkpoints import _command

        _command.main()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
