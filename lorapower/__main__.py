"""The command ``lorapower``, which is also ``python -m lorapower``."""

from __future__ import annotations

import os
import sys

from .errors import MissingError, needs


def main() -> None:
    """Run the command, or say which library it lacks, with exit status 2."""
    # Before anything imports torch: its threads spin while they wait, and take the time of others.
    # A pass of 0.7 s with one thread takes 9.8 s with two beside two busy processes, and 0.6 s so.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        with needs("checkpoints"):
            from .checkpoints import _command, _models
        _models.require_libraries()
        _command.main()
    except MissingError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
