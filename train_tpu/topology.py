"""TPU slices that one compiles for without having them, and what their chips can do.

The compiler is the libtpu wheel; it needs no TPU and no network. Figures are those of Google's pages
(cloud.google.com/tpu/docs/v5e and /v6e), the bandwidth of a link one way: 1600 and 3584 Gbit/s a chip over
4 links.
"""

import importlib.util
import math
import os
import re
from typing import NamedTuple

import jax
import numpy as np

from core.errors import UserError
from train_tpu.metrics import PEAK_FLOPS


class Chip(NamedTuple):
    """One chip of a slice."""

    kind: str
    """As JAX names the device."""
    hbm: float
    """Bytes a program may use: the compiler keeps a quarter to a half GiB for itself."""
    hbm_bandwidth: float
    """Bytes a second."""
    links: int
    link_bandwidth: float
    """Bytes a second of one link, one way."""
    clock: float | None
    """Cycles a second, from the peak: 4 units of 128 x 128 multiply-adds; None where that is not public."""

    @property
    def peak_flops(self) -> float:
        """bfloat16, a second."""
        return PEAK_FLOPS[self.kind]


GIB = 2**30
CHIPS = {
    "v5e": Chip("TPU v5 lite", 15.75 * GIB, 819e9, 4, 50e9, 197e12 / (4 * 128 * 128 * 2)),
    "v6e": Chip("TPU v6 lite", 31.25 * GIB, 1640e9, 4, 112e9, None),
}
HOST_CHIPS = 8  # of v5e and v6e, where a whole slice fits into one host


class Slice(NamedTuple):
    """A slice that is compiled for."""

    name: str
    devices: list[jax.Device]
    """Of a compile-only client: they hold no arrays."""
    chip: Chip


def open_slice(name: str) -> Slice:
    """The slice `GENERATION:XxY`, like v5e:2x4.

    Raises:
        UserError: there is no such slice, or libtpu is not installed.
    """
    found = re.fullmatch(r"(v\d+\w*):(\d+(?:x\d+)+)", name)
    if not found or found.group(1) not in CHIPS:
        raise UserError(
            f"--topology {name}: give GENERATION:XxY with one of {', '.join(CHIPS)}, for example v5e:2x4"
        )
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            "compiling for a TPU needs the TPU's compiler, not a TPU: pip install -c constraints.txt libtpu"
        )
    generation, shape = found.group(1), tuple(int(n) for n in found.group(2).split("x"))
    # The compiler is to ask no metadata server about the machine it runs on, and to let others compile.
    # Of what kind that machine were does not matter, the slice is named below; but without a kind it warns.
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-8")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    from jax.experimental import topologies

    options = {}
    if len(shape) == 2 and math.prod(shape) <= HOST_CHIPS:  # the default bounds describe several hosts
        options["chips_per_host_bounds"] = (*shape, 1)
    try:
        topology = topologies.get_topology_desc(platform="tpu", topology_name=name, **options)
        devices = list(np.ravel(topology.devices))
    except (jax.errors.JaxRuntimeError, RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"--topology {name}: the compiler knows no such slice ({reason})") from None
    chip = CHIPS[generation]
    if devices[0].device_kind != chip.kind:  # the rates below would be another chip's
        raise ValueError(f"{name} has chips of kind {devices[0].device_kind}, not {chip.kind}")
    return Slice(name, devices, chip)
