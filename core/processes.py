"""One run by several processes: each has some of the devices, and all of them run the same program.

Every process makes the same compiled calls in the same order; what only one may do (logs, samples, manifests)
the first does. So whatever decides the next call must be the same everywhere: it comes from the step's own
results, or it is agreed on here.
"""

import contextlib
import hashlib
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from core.errors import UserError, tell

ENVIRONMENT = "auto"  # as a coordinator: what a TPU pod, Slurm or MPI says
ARRIVAL = 300  # seconds within which all processes must have started
SILENCE = 30  # seconds without a sign of life after which a process is taken for dead, and the others end
LOST = re.compile("connection|peer|heartbeat|coordination", re.IGNORECASE)  # in what JAX says of it
FAREWELL = 60  # seconds that the first to finish waits for the last

_joined = False
T = TypeVar("T")


def join(coordinator: str | None, num_processes: int | None, process_id: int | None) -> None:
    """Makes this process one of several, before JAX finds its devices; nothing, without a coordinator.

    Raises:
        UserError: the three do not belong together, or the others did not come.
    """
    global _joined
    rest = (num_processes, process_id)
    if coordinator is None:
        if rest != (None, None):
            raise UserError("--num-processes and --process-id need --coordinator HOST:PORT")
        return
    if coordinator == ENVIRONMENT:
        if rest != (None, None):
            raise UserError(
                "--coordinator auto takes the number of processes from the environment: give no other"
            )
    elif None in rest or ":" not in coordinator or not 0 <= process_id < num_processes:
        raise UserError(
            f"--coordinator {coordinator} needs the form HOST:PORT, --num-processes N, and a --process-id "
            "from 0 to N - 1"
        )
    address = {} if coordinator == ENVIRONMENT else {"coordinator_address": coordinator}
    try:
        jax.distributed.initialize(
            **address,
            num_processes=num_processes,
            process_id=process_id,
            initialization_timeout=ARRIVAL,
            heartbeat_timeout_seconds=SILENCE,
            shutdown_timeout_seconds=FAREWELL,
        )
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"the processes of --coordinator {coordinator} did not come together: "
            f"{str(error).splitlines()[0]}"
        ) from None
    _joined = True


def age() -> float:
    """Seconds since this process started, its imports included (Linux)."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    return time.clock_gettime(time.CLOCK_BOOTTIME) - int(fields[19]) / os.sysconf("SC_CLK_TCK")


def is_first() -> bool:
    """Whether this process writes and prints; true of an only one."""
    return jax.process_index() == 0


def are_several() -> bool:
    """Whether this process is not alone."""
    return jax.process_count() > 1


def wait_for_all(what: str) -> None:
    """Returns when every process has come here."""
    if are_several():
        multihost_utils.sync_global_devices(what)


def in_turn(action: Callable[[], T]) -> T:
    """What `action` gives each process: the first does it alone, the others when it is done.

    For what is made once where the processes share a disk.
    """
    if is_first():
        made = action()
        wait_for_all("the first has made it")
        return made
    wait_for_all("the first has made it")
    return action()


def any_of(*flags: bool) -> tuple[bool, ...]:
    """Each flag, if it is set in any process; every process must ask."""
    if not are_several():
        return flags
    every = multihost_utils.process_allgather(np.array(flags))
    return tuple(map(bool, every.reshape(-1, len(flags)).any(axis=0)))


def require_equal(value: str, what: str) -> None:
    """Refuses to go on if the processes do not have the same `value`.

    Raises:
        UserError: in every process.
    """
    if not are_several():
        return
    digest = np.frombuffer(hashlib.sha256(value.encode()).digest(), np.uint8)
    every = multihost_utils.process_allgather(digest)
    if (every != every[0]).any():
        differing = np.flatnonzero((every != every[0]).any(axis=1)).tolist()
        raise UserError(f"processes {differing} have other {what} than process 0: give all of them the same")


@contextlib.contextmanager
def leaving_at_once() -> Iterator[None]:
    """A process of several that fails ends now, so that the others hear of it.

    Python would first wait for them to finish, who wait for this one.
    """
    try:
        yield
    except BaseException as error:
        if not _joined:
            raise
        code = tell(error)
        if code is None:
            code = 1
            if isinstance(error, jax.errors.JaxRuntimeError) and LOST.search(str(error)):
                said = str(error).splitlines()[0]
                print(
                    f"error: another process of this run has ended ({said}): the last checkpoint is kept; "
                    "start all of them again",
                    file=sys.stderr,
                )
            elif not isinstance(error, SystemExit):
                sys.excepthook(type(error), error, error.__traceback__)
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):  # nobody reads it any more, or it is closed
                stream.flush()
        os._exit(code)
