"""The command ``lorapower``, which is also ``python -m lorapower``."""

from __future__ import annotations

import sys
from typing import NoReturn


def main() -> NoReturn:
    """Run the command, or say which extra it needs, with exit status 2."""
    try:
        _run()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None


def _run() -> NoReturn:
    # Here, so that an interrupt while libraries are imported ends like any other.
    from .checkpoints import _libraries
    from .errors import InputError

    try:
        _libraries.require("checkpoints", "pandas", "peft", "rich", "transformers", "typer")
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    from .checkpoints import _command

    _command.main()


if __name__ == "__main__":
    main()
