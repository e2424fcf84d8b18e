"""The device mesh, and how parameters, optimizer state and batches are sharded over it.

This is the only module that knows the mesh. It always has three axes, of size 1 where nothing is said:

    data     rows of a batch; every device along it holds the same weights
    fsdp     rows of a batch, too, but each device keeps a part of every weight and of its moments, and
             weights are gathered a layer at a time while they are used (Rajbhandari et al. 2020, ZeRO-3)
    tensor   the same rows; each device computes some heads, some of the MLP's width and some of the
             vocabulary (Shoeybi et al. 2019, Megatron-LM)

What the axes of a leaf are is told from its path (core/leaves.py), so that optimizer moments, whose paths end
in the parameter's, follow their parameter. `fsdp` always splits the axis of the model's width, `tensor` the
other one: q, k, v, gate and up by their outputs, o and down by their inputs, so that between the two products
of attention and of the MLP nothing is exchanged and after them one sum. Norms and biases are a thousandth of
the parameters: every device holds them, which saves an exchange for each. The axis of layers is never split:
the loop over it would fetch every layer from another device, and growing takes layers out of it.
"""

import functools
import math
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.extend.core import Primitive
from jax.extend.core.primitives import sharding_constraint_p
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, Sharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from core.config import ModelConfig
from core.errors import UserError
from core.leaves import Axis, find_leaf, path_names

BATCH_AXES = ("data", "fsdp")  # what the rows of a batch are split over

# What an axis of a matrix is split over; the others are not.
MESH_AXES: dict[Axis, str] = {
    "width": "fsdp", "heads": "tensor", "kv_heads": "tensor", "mlp": "tensor", "vocab": "tensor",
}  # fmt: skip


class MeshShape(NamedTuple):
    """Devices along each axis of the mesh."""

    data: int = 1
    fsdp: int = 1
    tensor: int = 1

    def __str__(self) -> str:
        named = [f"{axis}={size}" for axis, size in self._asdict().items() if size > 1]
        return ",".join(named) or "data=1"


AXES = MeshShape._fields


def parse_mesh(text: str | None, n_devices: int) -> MeshShape:
    """The mesh that `text` ("fsdp=4,tensor=2") describes; None: all devices on `data`.

    Raises:
        UserError: the text is malformed, has an unknown or a repeated axis, or is for another number of
            devices.
    """
    if text is None:
        return MeshShape(data=n_devices)
    sizes: dict[str, int] = {}
    for part in text.split(","):
        axis, _, size = (word.strip() for word in part.partition("="))
        if not (size.isascii() and size.isdigit() and int(size) > 0):
            raise UserError(
                f"--mesh {text!r} cannot be read at {part.strip()!r}: "
                "write axes and their sizes, like fsdp=4,tensor=2"
            )
        if axis not in AXES:
            raise UserError(f"unknown axis {axis!r} in --mesh {text!r}: the axes are {', '.join(AXES)}")
        if axis in sizes:
            raise UserError(f"repeated axis {axis!r} in --mesh {text!r}: give each axis once")
        sizes[axis] = int(size)
    shape = MeshShape(**sizes)
    n = math.prod(shape)
    if n != n_devices:
        advice = f"the sizes must multiply to {n_devices}"
        if n_devices % n == 0:
            advice = f"--mesh {shape._replace(data=shape.data * (n_devices // n))} uses them all"
        raise UserError(f"--mesh {text} needs {n} devices, but there are {n_devices}: {advice}")
    return shape


def resolved_mesh(text: str | None, n_devices: int) -> str:
    """What `text` stands for on that many devices, so that two ways to write a mesh are one; a text that does
    not fit them stays what it is."""
    try:
        return str(parse_mesh(text, n_devices))
    except UserError:
        return str(text)


def make_mesh(shape: MeshShape | None = None, devices: list[jax.Device] | None = None) -> Mesh:
    """A mesh of all devices (or those given); without a shape, all of them on `data`.

    On a TPU the axes follow the links between the chips. They are `Auto`: XLA places what we do not, where
    JAX's new default would ask for a sharding at every gather.
    """
    devices = jax.devices() if devices is None else devices
    shape = MeshShape(data=len(devices)) if shape is None else shape
    array = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return Mesh(array, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def check_mesh(model: ModelConfig, shape: MeshShape, batch: int, grad_accum_steps: int = 1) -> None:
    """Refuses a mesh that a model, or a batch in `grad_accum_steps` parts, cannot be divided over equally.

    Raises:
        UserError: says which size does not divide, and a mesh or a batch that would.
    """
    for what, size, axis, parts in (
        ("heads", model.n_heads, "tensor", shape.tensor),
        ("d_mlp", model.d_mlp, "tensor", shape.tensor),
        ("d_model", model.d_model, "fsdp", shape.fsdp),
    ):
        if size % parts:
            raise UserError(
                f"--mesh {shape}: the model's {what} {size} cannot be divided over {axis}={parts}: "
                f"--mesh {_fitting_mesh(model, shape)} fits it"
            )
    parts = shape.data * shape.fsdp
    if batch % (parts * grad_accum_steps):
        nearest = max(1, round(batch / (parts * grad_accum_steps))) * parts * grad_accum_steps
        axes = "" if shape.tensor == 1 else f" (--mesh {shape}: data x fsdp)"
        raise UserError(
            f"--batch {batch} is not divisible by {parts} devices{axes} x --grad-accum-steps "
            f"{grad_accum_steps}: the nearest that is, is {nearest}"
        )


def _fitting_mesh(model: ModelConfig, shape: MeshShape) -> MeshShape:
    """A mesh of as many devices that a model can be divided over: what does not divide it goes to `data`."""
    fsdp = math.gcd(shape.fsdp, model.d_model)
    tensor = math.gcd(shape.tensor, model.n_heads, model.d_mlp)
    return MeshShape(math.prod(shape) // (fsdp * tensor), fsdp, tensor)


def describe_replication(model: ModelConfig, shape: MeshShape) -> str | None:
    """What a run is told of heads of keys and values that `tensor` does not divide; None where it does."""
    if model.kv_heads % shape.tensor == 0:
        return None
    return (
        f"the {model.kv_heads} heads of keys and values cannot be divided over tensor={shape.tensor}: every "
        "device holds the keys and values of all of them"
    )


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


def local_rows(sharding: NamedSharding, grad_accum_steps: int, rows: int) -> np.ndarray:
    """Which rows of a micro-batch of `rows` this process's devices need, in order; all, where it is alone."""
    places = sharding.addressable_devices_indices_map((grad_accum_steps, rows)).values()
    return np.unique(np.concatenate([np.arange(rows)[at] for _, at in places]))


def place(array: np.ndarray | np.generic, sharding: Sharding) -> Array:
    """An array or scalar that every process has whole, on all devices; each process gives its part."""
    if sharding.is_fully_addressable:
        return jax.device_put(array, sharding)
    array = np.asarray(array)
    return jax.make_array_from_callback(array.shape, sharding, lambda part: array[part])


def place_rows(array: np.ndarray, rows: np.ndarray, n_rows: int, sharding: NamedSharding) -> Array:
    """A batch [micro-batches, rows, ...] of which this process has `rows` (`local_rows`) of `n_rows`."""
    if sharding.is_fully_addressable:
        return jax.device_put(array, sharding)
    shape = (array.shape[0], n_rows, *array.shape[2:])

    def part(index: tuple[slice, ...]) -> np.ndarray:
        return array[:, np.searchsorted(rows, np.arange(n_rows)[index[1]])]

    return jax.make_array_from_callback(shape, sharding, part)


def split_axes(names: tuple[str, ...], shape: tuple[int, ...], sizes: Mapping[str, int]) -> P:
    """What each axis of a leaf is split over, by its path and shape; `sizes` are those of the mesh.

    Axes of size 1 are left out. So is one that does not divide the dimension: `check_mesh` lets only the
    vocabulary come here like that, whose tables are then held whole along `tensor`.
    """
    leaf = find_leaf(names)
    if leaf is None or not leaf.is_matrix:
        return P()
    axes = leaf.axes[-len(shape) :]  # one layer's has none of layers
    kept = []
    for name, size in zip(axes, shape, strict=True):
        axis = MESH_AXES.get(name)
        kept.append(axis if axis and sizes[axis] > 1 and size % sizes[axis] == 0 else None)
    return P(*kept) if any(kept) else P()


def state_shardings(mesh: Mesh, tree: Any) -> Any:
    """A sharding for every leaf of parameters, gradients, moments or a whole training state."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: NamedSharding(mesh, split_axes(path_names(path), leaf.shape, mesh.shape)), tree
    )


class Layout(NamedTuple):
    """How one leaf is sharded."""

    path: str
    shape: tuple[int, ...]
    spec: P
    device_bytes: int
    """Of this leaf, on each device."""


def layouts(mesh: Mesh | AbstractMesh, tree: Any) -> Iterator[Layout]:
    """How every leaf of a tree (of arrays, or of shapes and types) is sharded over a mesh."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        names = path_names(path)
        spec = split_axes(names, leaf.shape, mesh.shape)
        part = NamedSharding(mesh, spec).shard_shape(leaf.shape)
        yield Layout("/".join(names), leaf.shape, spec, math.prod(part) * leaf.dtype.itemsize)


# --- inside a compiled function ---


def is_parallel(mesh: Mesh | None) -> bool:
    """Whether there is more than one device to compute on."""
    return mesh is not None and mesh.size > 1


def per_device(mesh: Mesh | None, local: Callable, inputs: Any, outputs: Any) -> Callable:
    """`local` on each device's part of its arguments, split as `inputs` says; its results as `outputs`."""
    if not is_parallel(mesh):
        return local
    return jax.shard_map(local, mesh=mesh, in_specs=inputs, out_specs=outputs, check_vma=False)


def splits_weights(mesh: Mesh | None) -> bool:
    """Whether a device holds less than all of every weight."""
    return mesh is not None and mesh.shape["fsdp"] * mesh.shape["tensor"] > 1


def gathers_weights(mesh: Mesh | None) -> bool:
    """Whether weights are gathered before they are used."""
    return mesh is not None and mesh.shape["fsdp"] > 1


def constrain_activations(x: Float[Array, "B S D"], mesh: Mesh | None) -> Float[Array, "B S D"]:
    """Rows over the devices and nothing else, said at the residual stream.

    Left to itself XLA may follow the weights instead, and have every device hold some of the width of all
    rows.
    """
    if not is_parallel(mesh):
        return x
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P(BATCH_AXES)))


def constrain_parameters(tree: Any, mesh: Mesh | None) -> Any:
    """A tree of parameters, gradients or moments, sharded as `state_shardings` says."""
    if not is_parallel(mesh):
        return tree
    return jax.lax.with_sharding_constraint(tree, state_shardings(mesh, tree))


def all_gather_weights(module: Any, dtype: str, mesh: Mesh | None) -> Any:
    """A module's weights whole along `fsdp`, as they are needed to compute with; kernels as `dtype`.

    Their gradients are summed straight into the parts that are kept. Kernels are cast before, not where
    they are used, which for bfloat16 halves what is exchanged; tables stay as they are, since the gradients
    of their rows are summed in float32.
    """
    if not gathers_weights(mesh):
        return module

    def whole(path: tuple, leaf: Array) -> Array:
        names = path_names(path)
        kept = split_axes(names, leaf.shape, mesh.shape)
        if "fsdp" not in kept:
            return leaf
        used = P(*(None if axis == "fsdp" else axis for axis in kept))
        x = leaf.astype(dtype) if names[-1] == "kernel" else leaf
        return _reshard(x, NamedSharding(mesh, kept), NamedSharding(mesh, used))

    return jax.tree_util.tree_map_with_path(whole, module)


def embedding_lookup(
    table: Float[Array, "V D"], index: Int[Array, "B S"], mesh: Mesh | None, module: str = "embed"
) -> Float[Array, "B S D"]:
    """Rows of the table of `module`. Where devices hold parts of the vocabulary, each gives what it has and
    their sum is whole; XLA by itself would give every device all rows of the batch first.
    """
    if not splits_weights(mesh):
        return table[index]
    kept = split_axes((module, "table"), table.shape, mesh.shape)
    vocabulary, width = kept if kept else (None, None)

    def local(table: Array, index: Array) -> Array:
        if width is not None:
            table = jax.lax.all_gather(table, width, axis=1, tiled=True)
        if vocabulary is None:
            return table[index]
        place = index - jax.lax.axis_index(vocabulary) * len(table)
        here = (place >= 0) & (place < len(table))
        rows = table[jnp.clip(place, 0, len(table) - 1)]
        return jax.lax.psum(jnp.where(here[..., None], rows, 0), vocabulary)

    rows = P(BATCH_AXES)
    return jax.shard_map(local, mesh=mesh, in_specs=(kept, rows), out_specs=rows, check_vma=False)(
        table, index
    )


def map_dealt(
    function: Callable[[Float[Array, "n A B"]], Float[Array, "n A B"]],
    stack: Float[Array, "N A B"],
    spec: P,
    mesh: Mesh | None,
) -> Float[Array, "N A B"]:
    """`function` of whole matrices, each computed on one device: they are dealt to all devices of the mesh.

    Where a device has all of them it takes its own, and the results are gathered once. Where it has a part of
    each, devices exchange parts for whole matrices, and give back the results' parts in the same way.

    Args:
        function: of each matrix for itself; zeros fill up a number that the devices do not divide.
        spec: how the stack is split, of which its first axis is not, and how the result shall be.
    """
    if not is_parallel(mesh):
        return function(stack)
    split = {axis: dimension for dimension, axis in enumerate(spec) if axis}
    copied = tuple(axis for axis in mesh.axis_names if axis not in split)
    n_copies = math.prod(mesh.shape[axis] for axis in copied)

    def local(x: Array) -> Array:
        if n_copies > 1:
            x = x.reshape(n_copies, -1, *x.shape[1:])[jax.lax.axis_index(copied)]
        # XLA refuses to exchange parts of which some are still to be transposed.
        x = jax.lax.optimization_barrier(x) if split else x
        for axis, dimension in split.items():
            x = jax.lax.all_to_all(x, axis, split_axis=0, concat_axis=dimension, tiled=True)
        x = function(x)
        for axis, dimension in reversed(split.items()):
            x = jax.lax.all_to_all(x, axis, split_axis=dimension, concat_axis=0, tiled=True)
        return jax.lax.all_gather(x, copied, tiled=True) if n_copies > 1 else x

    n = len(stack)
    padded = jnp.pad(stack, ((0, -n % mesh.size), (0, 0), (0, 0)))
    return per_device(mesh, local, spec, spec)(padded)[:n]


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _reshard(x: Array, kept: NamedSharding, used: NamedSharding) -> Array:
    return jax.lax.with_sharding_constraint(x, used)


def _reshard_forward(x: Array, kept: NamedSharding, used: NamedSharding) -> tuple[Array, None]:
    return jax.lax.with_sharding_constraint(x, used), None


def _reshard_backward(kept: NamedSharding, used: NamedSharding, _: None, gradient: Array) -> tuple[Array]:
    return (jax.lax.with_sharding_constraint(gradient, kept),)


_reshard.defvjp(_reshard_forward, _reshard_backward)


def keep_all_but_gathered(primitive: Primitive, *_: Any, **__: Any) -> bool:
    """A policy for `jax.checkpoint`: the backward pass recomputes nothing but the all-gathers of weights.

    Otherwise every layer's whole weights would be kept for it, which is what `fsdp` is to avoid.
    """
    return primitive is not sharding_constraint_p
