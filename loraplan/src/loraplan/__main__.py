"""The command ``loraplan``, which is also ``python -m loraplan``."""

from __future__ import annotations

import os
import sys
import traceback

from ._errors import InputError, LoraplanError, ResultsError

# Exit status, beside those of what is done: bad input; what should not happen; interrupted.
BAD, FAILED, INTERRUPTED = 2, 3, 130
# What torch says, for processors and for devices, in words of no class of their own.
_NO_MEMORY = ("allocate memory", "not enough memory", "out of memory")


def main() -> None:
    """Run the command; errors are one line, or two and a traceback, with a status of their own."""
    # Before anything imports torch: its threads spin while they wait, and take the time of others.
    # A pass of 0.7 s with one thread takes 9.8 s with two beside two busy processes, and 0.6 s so.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        from . import _command

        raise SystemExit(_command.app(standalone_mode=False) or 0)
    except (KeyboardInterrupt, SystemExit) as ended:
        if isinstance(ended, SystemExit) and ended.code != INTERRUPTED:
            raise
        print("interrupted", file=sys.stderr)
        raise SystemExit(INTERRUPTED) from None
    except LoraplanError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(BAD if isinstance(error, InputError | ResultsError) else FAILED) from None
    except Exception as error:
        # Of typer's parser, whose classes have moved: an unknown flag, or no number.
        if format_message := getattr(error, "format_message", None):
            place = getattr(getattr(error, "ctx", None), "command_path", "loraplan")
            print(f"error: {' '.join(format_message().split())} ({place} --help)", file=sys.stderr)
            raise SystemExit(BAD) from None
        said = str(error)
        if isinstance(error, MemoryError) or any(words in said.lower() for words in _NO_MEMORY):
            remedy = "free some, take fewer --tokens, or a machine that has more"
            print(f"error: out of memory ({said[:200]}): {remedy}", file=sys.stderr)
        else:
            traceback.print_exc()
            print("error: this is unexpected; please report all of the above", file=sys.stderr)
        raise SystemExit(FAILED) from None


if __name__ == "__main__":
    main()
