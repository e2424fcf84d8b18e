"""The one error for users' mistakes, and how every command ends."""

import errno
import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any

EXIT_INTERRUPTED = 130  # by Ctrl-C, as a shell has it


class UserError(Exception):
    """A mistake in what the user gave us: one sentence that says what, where and what to do.

    Our own mistakes are assertions; they keep their traceback.
    """


def run_command(main: Callable[[], int | None]) -> None:
    """Runs `main` as a process: exit code 0 or what it returns; 2 and one sentence for a `UserError`.

    A full disk is a user's matter wherever it is met; Ctrl-C ends with 130 and no traceback.
    """
    sys.unraisablehook = _interrupt_again
    try:
        code = main()
    except BaseException as error:
        code = tell(error)
        if code is None:
            raise
    sys.exit(code or 0)


def tell(error: BaseException) -> int | None:
    """Says on stderr what a user is to know of an error, as `run_command` has it; the exit code.

    None, and nothing is said, for one that is to end with its traceback.
    """
    if isinstance(error, UserError):
        print(f"error: {error}", file=sys.stderr)
        return 2
    if isinstance(error, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    if isinstance(error, BrokenPipeError):  # `| head` closed our output: nothing is left to say
        sys.stderr.close()
        return 1
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        where = f" writing {error.filename}" if error.filename else ""
        print(f"error: the disk is full{where}: free some space and run the command again", file=sys.stderr)
        return 2
    return None


def _interrupt_again(lost: Any) -> None:
    """For `sys.unraisablehook`: a Ctrl-C that came within a destructor or a garbage collection, where Python
    drops every exception, comes again a moment later."""
    if lost.exc_type is KeyboardInterrupt:
        threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT)).start()
    else:
        sys.__unraisablehook__(lost)
