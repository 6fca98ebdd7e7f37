"""The command ``lorapower``, which is also ``python -m lorapower``."""

from __future__ import annotations

import os
import sys
import traceback

from .errors import MissingError, needs

# What torch says, for processors and for devices, in words of no class of their own.
_NO_MEMORY = ("allocate memory", "not enough memory", "out of memory")


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
    except Exception as error:
        said = str(error)
        if isinstance(error, MemoryError) or any(words in said.lower() for words in _NO_MEMORY):
            remedy = "free some, take fewer --tokens, or a machine that has more"
            print(f"error: out of memory ({said[:200]}): {remedy}", file=sys.stderr)
        else:
            traceback.print_exc()
            print("error: this is unexpected; please report all of the above", file=sys.stderr)
        raise SystemExit(3) from None


if __name__ == "__main__":
    main()
