"""A trace by JAX's profiler, for XProf and Perfetto, and the operations in it."""

import re
from collections.abc import Iterator
from pathlib import Path

import jax

from core.run.profiling import Operation, add_up

_CONTAINERS = ("while", "call", "conditional")  # their time is that of the operations in them


def start_trace(folder: Path) -> None:
    """Begins a trace, to be written into `folder`."""
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # the host's calls of Python would be most of it
    jax.profiler.start_trace(folder, create_perfetto_trace=True, profiler_options=options)


def stop_trace(folder: Path, program: str) -> list[Operation]:
    """Ends it; gives the operations that ran meanwhile.

    program: the text of the compiled step, which says what its operations are made of.
    """
    jax.profiler.stop_trace()
    newest = max(folder.rglob("*.xplane.pb"), key=lambda path: path.stat().st_mtime)
    made_of = dict(re.findall(r'^\s*(?:ROOT )?%?([\w.-]+) = .*op_name="([^"]*)"', program, re.MULTILINE))
    calls = (
        (f"{name} ({_short(made_of[name])})" if name in made_of else name, seconds)
        for name, seconds in _calls(newest)
    )
    return add_up(calls)


def _calls(trace: Path) -> Iterator[tuple[str, float]]:
    """Name and seconds of every operation. A TPU has a line of them; on a GPU they are the kernels of its
    streams, and on a CPU they lie between other events of its threads."""
    for plane in jax.profiler.ProfileData.from_file(str(trace)).planes:
        lines = list(plane.lines)
        if own := [line for line in lines if line.name == "XLA Ops"]:
            lines = own
        for line in lines:
            for event in line.events:
                found = dict(event.stats).get("hlo_op", event.name if own else None)
                if found is None or event.name.startswith("end: "):
                    continue
                name = operation_name(str(found), event.name)
                if not name.startswith(_CONTAINERS):
                    yield name, event.duration_ns / 1e9


def operation_name(operation: str, kernel: str) -> str:
    """What an event is called: the operation of the program, and for one within a CUDA graph, of which XLA
    only says which graph it is in, the kernel without its arguments."""
    if not operation.startswith("command_buffer"):
        return operation
    return re.sub(r"^void |\(anonymous namespace\)::|(?<!^)[<(].*", "", kernel)


def _short(op_name: str) -> str:
    """The end of a path such as jit(train_step)/jvp()/while/body/dot_general."""
    parts = [part for part in op_name.split("/") if part not in ("jit(train_step)", "closed_call", "body")]
    return "/".join(parts[-3:])
