"""TPU slices that can be compiled for without having them.

The compiler is the libtpu wheel; it needs no TPU and no network.
"""

import importlib.util
import math
import os
import re
from typing import TYPE_CHECKING

from core.errors import UserError

if TYPE_CHECKING:
    import jax

GIB = 2**30
HBM = {"v5e": 15.75 * GIB, "v6e": 31.25 * GIB}
"""Bytes per chip that the compiler lets a program use, by generation."""
HOST_CHIPS = 8  # of v5e and v6e, where a whole slice fits into one host


def parse_topology(name: str) -> tuple[str, tuple[int, ...]]:
    """Generation and shape of a slice: `v5e:2x4` is ("v5e", (2, 4)).

    Raises:
        UserError: the name is malformed, or libtpu is not installed.
    """
    found = re.fullmatch(r"(v\d+\w*):(\d+(?:x\d+)+)", name)
    if not found or found.group(1) not in HBM:
        raise UserError(
            f"--topology {name}: give GENERATION:XxY with one of {', '.join(HBM)}, for example v5e:2x4"
        )
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            "compiling for a TPU needs the TPU's compiler, not a TPU: pip install -c constraints.txt libtpu"
        )
    return found.group(1), tuple(int(n) for n in found.group(2).split("x"))


def open_slice(name: str) -> "list[jax.Device]":
    """The chips of a slice, as devices that only compile: they hold no arrays.

    Raises:
        UserError: there is no such slice, or libtpu is not installed.
    """
    _, shape = parse_topology(name)
    # The compiler must not ask a metadata server about this machine, and must let others compile. It warns if
    # the machine has no type; which one does not matter, since the slice is named below.
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-8")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    import jax
    from jax.experimental import topologies

    options = {}
    if len(shape) == 2 and math.prod(shape) <= HOST_CHIPS:  # the default bounds describe several hosts
        options["chips_per_host_bounds"] = (*shape, 1)
    try:
        topology = topologies.get_topology_desc(platform="tpu", topology_name=name, **options)
        return list(topology.devices)
    except (jax.errors.JaxRuntimeError, RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"--topology {name}: the compiler does not know this slice ({reason})") from None
