"""Where arrays lie: the device mesh, and how parameters, optimizer state and batches are laid over it.

This is the only module that knows the mesh. Parameters are replicated and the batch is split over
the axis `data`; every rule is a function of a leaf's path, so that optimizer moments, whose paths end
in the parameter's, follow their parameter.
"""

import os
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

BATCH_AXES = "data"  # what the first axis of a batch is split over


def make_mesh(devices: list[jax.Device] | None = None) -> Mesh:
    """A mesh of all devices (or those given) along `data`.

    Axes are `Auto`: XLA places what we do not, where JAX's new default would ask for a sharding at
    every gather.
    """
    devices = jax.devices() if devices is None else devices
    return Mesh(np.array(devices), ("data",), axis_types=(AxisType.Auto,))


def require_deterministic_operations() -> None:
    """Has XLA use only GPU operations that give the same bits every time; before JAX finds its devices.

    Besides slower gradients of look-ups it turns off autotuning, whose choices differ from process to
    process. CPU and TPU are deterministic without it.
    """
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_deterministic_ops=true"


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds the whole array."""
    return NamedSharding(mesh, P())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """For batches [micro batches, rows, ...]: rows are split over the devices."""
    return NamedSharding(mesh, P(None, BATCH_AXES))


def state_shardings(mesh: Mesh, tree: Any) -> Any:
    """A sharding for every leaf of parameters, moments or a whole training state."""
    return jax.tree.map(lambda _: replicated(mesh), tree)
