"""The kernels of a training step in JAX: XLA's custom calls of csrc/binding_xla.cpp, by `jax.ffi`.

The formulas and gradients that they stand in for are in core/ops.py. A call's name has the hash of its
sources: compiled programs are kept on disk, and what a name stands for is not part of their key.
"""

import ctypes
import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from core.ops import Heads, Kernels
from kernels_cuda.compiler import XLA, has_hopper, sources_hash
from kernels_cuda.files import Source, find_file

TARGETS = (
    "rms_norm", "add_rms_norm", "rms_norm_backward", "rotary", "rotary_pack", "rotary_unpack", "qkv_product",
    "softmax_loss", "loss_product", "swiglu_product", "swiglu_product_backward", "gelu_product",
    "gelu_product_backward", "adamw",
)  # fmt: skip
WIDTHS = (64, 128, 384, 512, 576, 768, 960, 1024)  # of rows that rms_norm.cu holds in registers
HEAD_SIZES = (64, 128)  # of heads that qkv_product.cu has whole in a tile
PROCESSORS = 132  # of an H100 or H200
HOPPER = "9.0"  # their architecture, the only one that hopper.cuh is for

_registered: set[str] = set()  # files whose calls XLA knows


def find(device: jax.Device, compile_missing: bool = True) -> Source:
    """The file for a GPU that JAX has found, or why there is none."""
    capability = re.fullmatch(r"(\d+)\.(\d+)", str(getattr(device, "compute_capability", "")))
    if device.platform != "gpu" or capability is None:
        return Source(None, f"XLA's operations, because {device.device_kind} is no NVIDIA GPU")
    major, minor = map(int, capability.groups())
    return find_file(XLA, (major, minor), "XLA's operations", compile_missing)


def load(device: jax.Device) -> tuple[Kernels | None, str]:
    """The kernels for a GPU, and which file they are of; None, and why there are none.

    Where a compiler is and no file, it compiles one (about half a minute, once).
    """
    source = find(device)
    if source.file is None:
        return None, source.reason.removeprefix("XLA's operations, because ")
    try:
        register(str(source.file))
    except (OSError, AttributeError) as error:
        return None, f"{source.file} does not load: {error}"
    hopper = device.compute_capability == HOPPER and has_hopper(source.file)
    return make(getattr(device, "core_count", PROCESSORS), hopper), source.reason


def register(file: str) -> None:
    """Makes the calls of a built file known to XLA; once per process.

    Raises:
        OSError, AttributeError: it is no library, or lacks a call.
    """
    if file in _registered:
        return
    library = ctypes.CDLL(file)
    for name in TARGETS:
        handler = jax.ffi.pycapsule(getattr(library, f"mtlm_{name}"))
        jax.ffi.register_ffi_target(target(name), handler, platform="CUDA")
    _registered.add(file)


@functools.cache
def target(name: str) -> str:
    """The name of a call."""
    return f"mtlm_{name}_{sources_hash(XLA)[:12]}"


@functools.cache
def make(processors: int, hopper: bool) -> Kernels:
    """The kernels for a GPU with this many multiprocessors. Nothing is loaded: see `register`."""
    return Kernels(
        widths=WIDTHS,
        rms_norm=_rms_norm,
        add_rms_norm=_add_rms_norm,
        rms_norm_backward=functools.partial(_rms_norm_backward, processors),
        rotary=_rotary,
        rotary_unpack=_rotary_unpack,
        rotary_pack=_rotary_pack,
        softmax_loss=_softmax_loss,
        product_types=("bfloat16",) if hopper else (),
        product_head_sizes=HEAD_SIZES,
        qkv_product=_qkv_product,
        loss_product=_loss_product,
        swiglu_product=_swiglu_product,
        swiglu_product_backward=_swiglu_product_backward,
        gelu_product=_gelu_product,
        gelu_product_backward=_gelu_product_backward,
        adamw=_adamw,
    )


def _call(
    name: str, results: Any, *arrays: Array, aliases: dict[int, int] | None = None, **options: Any
) -> Any:
    """A custom call; `aliases` says which argument's memory a result gets."""
    out = jax.ffi.ffi_call(target(name), results, input_output_aliases=aliases)(*arrays, **options)
    return tuple(out) if isinstance(out, list) else out


def _like(x: Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


def _row_values(rows: Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(rows.shape[:1], jnp.float32)


def _rms_norm(x, scale, eps):
    return _call("rms_norm", (_like(x), _row_values(x)), x, scale, eps=np.float64(eps))


def _add_rms_norm(x, branch, scale, eps):
    results = (_like(x), _like(x), _row_values(x))
    return _call("add_rms_norm", results, x, branch, scale, eps=np.float64(eps))


def _rms_norm_backward(processors, d_normed, d_sum, x, rstd, scale):
    # One row of partial sums of scale's gradient for each block of the grid: two blocks share a
    # multiprocessor, and each takes at least 8 rows at a time.
    blocks = max(1, min(-(-x.shape[0] // 8), 2 * processors))
    partials = jax.ShapeDtypeStruct((blocks, x.shape[1]), jnp.float32)
    results = (_like(x), _like(scale), partials)
    return _call("rms_norm_backward", results, d_normed, d_sum, x, rstd, scale)[:2]


def _rotary(q, k, cos, sin, back):
    return _call("rotary", (_like(q), _like(k)), q, k, cos, sin, aliases={0: 0, 1: 1}, conjugate=back)


def _rotary_unpack(packed: Array, heads: Heads, angles: tuple[Array, ...]):
    return _call("rotary_unpack", _apart(packed, packed.shape[2], heads), packed, *angles, conjugate=False)


def _apart(x: Array, width: int, heads: Heads) -> list[jax.ShapeDtypeStruct]:
    """q, k and v of x [B, S, ...], from their width together."""
    return [jax.ShapeDtypeStruct((*x.shape[:2], n, width // sum(heads)), x.dtype) for n in heads]


def _rotary_pack(q, k, v, angles):
    b, s, _, size = q.shape
    heads = q.shape[2] + k.shape[2] + v.shape[2]
    packed = jax.ShapeDtypeStruct((b, s, heads * size), q.dtype)
    return _call("rotary_pack", packed, q, k, v, *angles, conjugate=True)


def _qkv_product(x, weight, bias, heads, angles):
    given = angles if bias is None else (bias, *angles)
    results = _apart(x, weight.shape[1], heads)
    return _call("qkv_product", results, x.reshape(-1, x.shape[-1]), weight, *given)


def _softmax_loss(logits, targets, z_loss):
    results = (_like(logits), _row_values(logits), _row_values(logits))
    return _call("softmax_loss", results, logits, targets, aliases={0: 0}, z_loss=np.float64(z_loss))


def _loss_product(hidden, table, targets, z_loss):
    rows, vocab = hidden.shape[0], table.shape[0]
    exps = jax.ShapeDtypeStruct((rows, vocab), hidden.dtype)
    of_rows = _row_values(hidden)
    # Logits of the targets, and sums over each 128 ids.
    room = (of_rows, jax.ShapeDtypeStruct((-(-vocab // 128), rows), jnp.float32))
    results = (exps, of_rows, of_rows, of_rows, *room)
    exps, total, nll, scale, *_ = _call(
        "loss_product", results, hidden, table, targets, z_loss=np.float64(z_loss)
    )
    return exps, scale, total, nll


def _swiglu_product(x, weight):
    width = weight.shape[1]
    results = [jax.ShapeDtypeStruct((x.shape[0], n), x.dtype) for n in (width, width // 2)]
    return _call("swiglu_product", results, x, weight)


def _swiglu_product_backward(d, down, gate_up):
    results = (_like(gate_up), jax.ShapeDtypeStruct((d.shape[0], down.shape[0]), d.dtype))
    return _call("swiglu_product_backward", results, d, down, gate_up)


def _gelu_product(x, weight, bias):
    result = jax.ShapeDtypeStruct((x.shape[0], weight.shape[1]), x.dtype)
    return _call("gelu_product", (result, result), x, weight, bias)


def _gelu_product_backward(d, down, up):
    rows, width = up.shape
    d_bias = jax.ShapeDtypeStruct((width,), jnp.float32)
    # Sums over the rows of each of the eight warps that have tiles of 256 rows.
    partials = jax.ShapeDtypeStruct((8 * -(-rows // 256), width), jnp.float32)
    return _call("gelu_product_backward", (_like(up), d_bias, partials), d, down, up)[:2]


def _adamw(params, gradients, first, second, lr, step, grad_scale, skip, beta1, beta2, eps, weight_decay):
    n, scalars = len(params), (lr, step, grad_scale, skip)
    results = [_like(x) for x in (*params, *first, *second)]
    at = [len(scalars) + i for i in (*range(n), *range(2 * n, 4 * n))]
    updated = _call(
        "adamw", results, *scalars, *params, *gradients, *first, *second,
        aliases={argument: result for result, argument in enumerate(at)},
        beta1=np.float64(beta1), beta2=np.float64(beta2), eps=np.float64(eps),
        weight_decay=np.float64(weight_decay),
    )  # fmt: skip
    return list(updated[:n]), list(updated[n : 2 * n]), list(updated[2 * n :])
