"""The one error for users' mistakes, and how every command ends."""

import contextlib
import errno
import io
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

from core.cache import CACHE, VARIABLE

EXIT_INTERRUPTED = 130  # by Ctrl-C, as a shell has it
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""What a disk says that takes no more: full, the user's share used up, or the file too large."""
FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)


class UserError(Exception):
    """A mistake in what the user gave us: one sentence that says what, where and what to do.

    Our own mistakes are other exceptions; they keep their traceback.
    """


def run_command(main: Callable[[], int | None]) -> None:
    """Runs `main` as a process: exit code 0 or what it returns; 2 and one sentence for a `UserError`.

    What the operating system refuses is a user's matter wherever it is met (`os_error`); Ctrl-C ends with
    130, at once and with no traceback. A character that the terminal's encoding lacks is printed as its
    escape, as on stderr: a sample's must not end a training run.
    """
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")
    sys.unraisablehook = _interrupt_again
    if signal.getsignal(signal.SIGINT) is _leave_imports:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        code = main()
    except BaseException as error:
        code = tell(error)
        if code is None:
            raise
    if code == EXIT_INTERRUPTED:  # while XLA compiles, Python's own end crashes under the compiler's threads
        end_at_once(code)
    sys.exit(code or 0)


def end_at_once(code: int) -> NoReturn:
    """Ends the process without Python's own end, which waits for threads and calls what asked for it."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # nobody reads it any more, or it is closed
            stream.flush()
    os._exit(code)


def tell(error: BaseException) -> int | None:
    """Prints an error for the user on stderr, as `run_command` does; returns the exit code.

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
    refused = error if isinstance(error, OSError) else _of_rust(error)
    if refused is not None and (sentence := os_error(refused)):
        print(f"error: {sentence}", file=sys.stderr)
        if refused.errno in FULL:
            sys.unraisablehook = _drop_full
        return 2
    return None


def _of_rust(error: BaseException) -> OSError | None:
    """What the operating system refused a library in Rust, safetensors' or tokenizers' say: they raise
    exceptions of their own, whose text ends as Rust writes such an error. None for any other error."""
    found = re.search(r"\(os error (\d+)\)$", str(error)) if isinstance(error, Exception) else None
    return None if found is None else OSError(int(found[1]), os.strerror(int(found[1])))


def os_error(error: OSError) -> str | None:
    """One sentence for what the operating system refused: what, where and what to do.

    None where it names neither a file nor one of the machine's limits: then it is no matter of the user's.
    """
    name = error.filename2 or error.filename
    name = os.fsdecode(name) if isinstance(name, str | bytes | os.PathLike) else None
    if error.errno in FULL:
        where = f" writing {name}" if name else ""
        return f"the disk is full{where}: free some space and run the command again"
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return "too many files are open: raise the limit (`ulimit -n 65536`) and run the command again"
    if error.errno == errno.ENOMEM:
        return f"the machine is out of memory ({error.strerror}): free some and run the command again"
    if name is None or error.errno is None:
        return None
    if error.errno in FORBIDDEN and _is_of_cache(Path(name)):
        where = f"the cache is {CACHE}: set {VARIABLE} to a folder that you may write to"
        return f"{name}: {error.strerror}: {where}"
    if error.errno in FORBIDDEN:
        return f"{name}: {error.strerror}: give a path that you may read or write, or change its permissions"
    return f"{name}: {error.strerror}: check the path, and that its disk is there and works"


def _is_of_cache(path: Path) -> bool:
    """Whether a path is in the cache, or is a folder that would have had to be made for it."""
    path = path.absolute()
    if path.is_relative_to(CACHE.absolute()):
        return True
    return CACHE.absolute().is_relative_to(path) and not os.path.lexists(path)


@contextlib.contextmanager
def noted(say: Callable[[str], None]) -> Iterator[None]:
    """For a dry run, which is asked what would be done and at what cost, maybe for another machine: says what
    would be refused for what is there now, and does not fail."""
    try:
        yield
    except UserError as error:
        say(f"note: without --dry-run this would be refused now: {error}")


def open_missing_streams() -> None:
    """Opens the null device as each of standard input, output and error that this process was started without
    (`>&-`). To be called before anything else opens a file.

    Otherwise the next file that is opened gets the number, and what a library prints goes into it.
    """
    missing = []
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
        missing.append(descriptor)
    os.close(descriptor)
    for number, name in ((1, "stdout"), (2, "stderr")):
        if number in missing and getattr(sys, name) is None:
            stream = io.FileIO(number, "w", closefd=False)
            setattr(sys, name, io.TextIOWrapper(stream, encoding="utf-8", write_through=True))


def quiet_imports() -> None:
    """Ends this command without a traceback if Ctrl-C comes while its modules are still being imported.

    To be called by the `__init__` of a package with commands: imports take seconds, and `run_command` has
    not begun. Importing a C extension can swallow a KeyboardInterrupt, so the process ends in the handler;
    nothing has been written yet.
    """
    ours = sys.argv[:1] == ["-m"]  # while `python -m` imports the package of its module
    if ours and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _leave_imports)


def _leave_imports(*_: Any) -> None:
    os.write(2, b"interrupted\n")
    os._exit(EXIT_INTERRUPTED)


def _interrupt_again(lost: Any) -> None:
    """For `sys.unraisablehook`: a Ctrl-C that came within a destructor or a garbage collection, where Python
    drops every exception, comes again a moment later."""
    if lost.exc_type is KeyboardInterrupt:
        threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT)).start()
    else:
        sys.__unraisablehook__(lost)


def _drop_full(lost: Any) -> None:
    """For `sys.unraisablehook` once a full disk has been told of: files that are dropped with unwritten text
    meet it again. Python says so from 3.13 on."""
    if not (isinstance(lost.exc_value, OSError) and lost.exc_value.errno in FULL):
        _interrupt_again(lost)
