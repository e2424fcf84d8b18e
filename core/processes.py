"""One run by several processes: each has some of the devices, and all of them run the same program.

Every process makes the same compiled calls in the same order; what only one may do (logs, samples, manifests)
the first does. So whatever decides the next call must be the same everywhere: it comes from the step's own
results, or it is agreed on here.
"""

import atexit
import contextlib
import hashlib
import itertools
import re
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import jax
import numpy as np
from jax._src import distributed  # its key-value store has no public name
from jax.experimental import multihost_utils

import core.run.folder
from core.errors import UserError, end_at_once, tell
from core.progress import Activity
from core.watch import PATIENCE, WAY_OUT, Watch

ENVIRONMENT = "auto"  # as a coordinator: what a TPU pod, Slurm or MPI says
ARRIVAL = 300  # seconds within which all processes must have started
AFTERWARDS = 60  # seconds more before JAX, where they have not, aborts the process with a stack of C++
PORTS = range(1, 1 << 16)
SILENCE = 30  # seconds without a sign of life after which a process is taken for dead, and the others end
FAREWELL = 60  # seconds that the first to finish waits for the last
# Seconds after a broken connection within which the cause is heard from the process that failed.
HEARING = 3.0
# In what is said of a process that is gone, by JAX, by gloo and by Orbax, each with an error type of its own.
LOST = re.compile("gloo|nccl|peer|heartbeat|coordination|barrier|socket closed|connection", re.IGNORECASE)

_watch: Watch | None = None
_calls = itertools.count()  # of what all processes do in the same order: a name for each
T = TypeVar("T")


def join(coordinator: str | None, num_processes: int | None, process_id: int | None) -> None:
    """Makes this process one of several, before JAX finds its devices; nothing, without a coordinator.

    Raises:
        UserError: the three do not belong together, or no connection can be made. Where the others do not
            come, the process ends as it would for one.
    """
    global _watch
    rest = (num_processes, process_id)
    if coordinator is None:
        if rest != (None, None):
            raise UserError("--num-processes and --process-id need --coordinator HOST:PORT")
        return
    address = {}
    if coordinator == ENVIRONMENT:
        if rest != (None, None):
            raise UserError(
                "--coordinator auto takes the number of processes from the environment: give no other"
            )
    else:
        port = _port_of(coordinator)
        if port is None or None in rest or not 0 <= process_id < num_processes:
            raise UserError(
                f"--coordinator {coordinator} needs the form HOST:PORT, --num-processes N, and a "
                "--process-id from 0 to N - 1"
            )
        if process_id == 0:
            _require_free_port(port, coordinator)
        address = {"coordinator_address": coordinator}
    try:
        with Activity("waiting for the other processes"):
            _connect(address, num_processes, process_id)
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"the processes of --coordinator {coordinator} could not connect to each other: "
            f"{str(error).splitlines()[0]}"
        ) from None
    except TimeoutError:
        _give_up(
            UserError(
                f"not all processes of --coordinator {coordinator} came within {ARRIVAL} s: start all of "
                "them with the same --coordinator and --num-processes, each with a --process-id of its own, "
                "where they can reach that address"
            )
        )
    except KeyboardInterrupt as error:
        _give_up(error)
    state = distributed.global_state
    if state.num_processes > 1:
        _watch = Watch(state.client, state.process_id, state.num_processes, SILENCE)
        atexit.register(_watch.leave)  # before JAX's own farewell, which was registered earlier
    said = int(broadcast(str(state.num_processes)))
    if said != state.num_processes:  # JAX does not mind; the watch would wait for one that there is not
        raise UserError(
            f"--num-processes is {state.num_processes} here and {said} in process 0: give all the same"
        )


def _port_of(coordinator: str) -> int | None:
    """The port in HOST:PORT, [IPv6]:PORT among them; None if it is not of that form."""
    host, _, port = coordinator.rpartition(":")
    bare = ":" in host and not (host.startswith("[") and host.endswith("]"))  # an IPv6 without its port
    if not host or bare or not (port.isascii() and port.isdigit()) or int(port) not in PORTS:
        return None
    return int(port)


def _require_free_port(port: int, coordinator: str) -> None:
    """Refuses a port on which a program listens: another run's first process would share it with this one,
    and each of the others would join either."""
    with socket.socket() as probe:
        # Connections that are closing do not count.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            raise UserError(
                f"process 0 cannot listen on port {port} of --coordinator {coordinator} ({error.strerror}): "
                "give all processes another port, or end the run that has it"
            ) from None


def _connect(address: dict[str, str], num_processes: int | None, process_id: int | None) -> None:
    """Connects to the other processes.

    JAX waits for them in C++, hears no Ctrl-C meanwhile and would abort in the end. So it waits in a thread.

    Raises:
        TimeoutError: they did not come; the thread still waits for them.
    """
    done: Future[None] = Future()

    def connect() -> None:
        try:
            jax.distributed.initialize(
                **address,
                num_processes=num_processes,
                process_id=process_id,
                initialization_timeout=ARRIVAL + AFTERWARDS,
                heartbeat_timeout_seconds=PATIENCE,  # core/watch.py notices sooner and ends more gently
                shutdown_timeout_seconds=FAREWELL,
            )
        except BaseException as error:
            done.set_exception(error)
        else:
            done.set_result(None)

    threading.Thread(name="connect", target=connect, daemon=True).start()
    done.result(timeout=ARRIVAL)


def _give_up(error: BaseException) -> NoReturn:
    """Ends this process, whose `_connect` still waits: Python's own end would wait with it."""
    end_at_once(tell(error))


def _client() -> Any:
    """JAX's client of the key-value store that the first process keeps for all."""
    return distributed.global_state.client


def is_first() -> bool:
    """Whether this process writes and prints; true of an only one."""
    return jax.process_index() == 0


def are_several() -> bool:
    """Whether this process is not alone."""
    return jax.process_count() > 1


def barrier(what: str) -> None:
    """Returns when every process has come here."""
    reserve_barrier(what)()


def reserve_barrier(what: str) -> Callable[[], None]:
    """What `barrier` waits for, to be called later, from a thread: every process must ask for it now."""
    name = f"mtlm/{next(_calls)}/{what}"

    def wait() -> None:
        if are_several():
            _client().wait_at_barrier(name, PATIENCE * 1000)

    return wait


def broadcast(value: str) -> str:
    """The first process's value, in every process; all must ask."""
    if not are_several():
        return value
    key = f"mtlm/{next(_calls)}/told"
    if is_first():
        _client().key_value_set(key, value)
        return value
    return _client().blocking_key_value_get(key, PATIENCE * 1000)


@contextlib.contextmanager
def committing() -> Iterator[None]:
    """While it is entered, the end of another process does not end this one."""
    with _watch.committing if _watch else contextlib.nullcontext():
        yield


def in_turn(action: Callable[[], T]) -> T:
    """What `action` gives each process: the first does it alone, the others when it is done.

    For what is made once where the processes share a disk.
    """
    if is_first():
        made = action()
        barrier("the first has made it")
        return made
    barrier("the first has made it")
    return action()


def any_of(*flags: bool) -> tuple[bool, ...]:
    """Each flag, if it is set in any process; every process must ask."""
    if not are_several():
        return flags
    every = multihost_utils.process_allgather(np.array(flags))
    return tuple(map(bool, every.reshape(-1, len(flags)).any(axis=0)))


def require_shared(folder: Path) -> None:
    """`core.run.folder.require_shared` among these processes."""
    if are_several():
        core.run.folder.require_shared(folder, is_first(), broadcast, lambda flag: any_of(flag)[0])


def require_equal(value: str, what: str) -> None:
    """Refuses to continue if the processes do not have the same `value`.

    Raises:
        UserError: in every process.
    """
    if not are_several():
        return
    digest = np.frombuffer(hashlib.sha256(value.encode()).digest(), np.uint8)
    every = multihost_utils.process_allgather(digest)
    if (every != every[0]).any():
        differing = np.flatnonzero((every != every[0]).any(axis=1)).tolist()
        raise UserError(
            f"processes {differing} have different {what} from process 0: give all of them the same"
        )


@contextlib.contextmanager
def leaving_at_once() -> Iterator[None]:
    """A process of several that fails ends now, and the others hear why.

    Python would first wait for them to finish, who wait for this one.
    """
    try:
        yield
    except BaseException as error:
        if _watch is None:
            raise
        if _is_loss(error):
            said = f"another process of this run has ended ({_first_line(error)}): {WAY_OUT}"
            _watch.say_and_end(*(_cause() or (said, 1)))
        code = tell(error)
        if code is None:
            code = error.code if isinstance(error, SystemExit) and isinstance(error.code, int) else 1
            if not isinstance(error, SystemExit):
                sys.excepthook(type(error), error, error.__traceback__)
        _watch.fail(_first_line(error), code)


def _is_loss(error: BaseException) -> bool:
    """Whether an error is of an exchange with a process that is gone."""
    kinds = (jax.errors.JaxRuntimeError, ValueError, RuntimeError, TimeoutError, ConnectionError)
    return isinstance(error, kinds) and bool(LOST.search(str(error)))


def _cause() -> tuple[str, int] | None:
    """What the process that failed says of it, if that is heard within a moment."""
    deadline = time.monotonic() + HEARING
    while time.monotonic() < deadline:
        with contextlib.suppress(Exception):  # the first is gone, and the store with it
            if heard := _watch.heard():
                return heard
        time.sleep(0.1)
    return None


def _first_line(error: BaseException) -> str:
    said = (str(error).splitlines() or [""])[0]
    return said if isinstance(error, UserError) else f"{type(error).__name__}: {said}"
