"""The one error for users' mistakes, and how every command ends."""

import sys
from collections.abc import Callable


class UserError(Exception):
    """A mistake in what the user gave us: one sentence that says what, where and what to do.

    Our own mistakes are assertions; they keep their traceback.
    """


def run_command(main: Callable[[], int | None]) -> None:
    """Runs `main` as a process: exit code 0 or what it returns; 2 and one sentence for a `UserError`."""
    try:
        code = main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        code = 2
    except BrokenPipeError:  # `| head` closed our output: nothing is left to say
        sys.stderr.close()
        code = 1
    sys.exit(code or 0)
