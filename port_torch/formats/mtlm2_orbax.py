"""The original MTLM2's (TinyGPT's) checkpoints: a flax.linen TrainState, as Orbax's StandardSave wrote it."""

import logging
import re
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch
from jaxtyping import Float

from core.checkpoint.checkpointer import flatten
from core.config import ModelConfig
from core.errors import UserError
from port_torch.folder import require_finite, require_tensors, require_type
from port_torch.formats.imported import Imported, assemble

NAME = "mtlm2-orbax"
NORM_EPS = 1e-6  # what the original fixes and its tensors do not tell
ORBAX = "_METADATA"  # the file that lists the arrays

ATTENTION = "MultiHeadDotProductAttention_0"
LAYER_MODULES = {  # module of core.model -> linen's within a block
    "attn_norm": "RMSNorm_0",
    "attn/q": f"{ATTENTION}/query",
    "attn/k": f"{ATTENTION}/key",
    "attn/v": f"{ATTENTION}/value",
    "attn/o": f"{ATTENTION}/out",
    "mlp_norm": "RMSNorm_1",
    "mlp/up": "Dense_0",
    "mlp/down": "Dense_1",
}
OTHERS = {
    "embed/table": "tok_emb/embedding",
    "positions/table": "pos_emb",
    "norm/scale": "norm_f/scale",
    "head/kernel": "head/kernel",
}


def recognizes(path: Path) -> bool:
    """Whether `path` is a folder that Orbax wrote, or a CheckpointManager's folder of steps."""
    return _find_item(path) is not None


def read(path: Path) -> Imported:
    """Reads the parameters of the newest step; the optimizer's arrays are not loaded.

    Raises:
        UserError: it is of another model, or damaged as far as that can be seen: Orbax keeps no checksums of
            its own, and an array whose file is gone reads as zeros.
    """
    item = _find_item(path)
    if item is None:
        raise ValueError(f"{path} holds no Orbax item, though `recognizes` found one")
    arrays = _load(item)
    config = _config(item, arrays)
    expected = _expected(config)
    require_tensors(item, {name: array.shape for name, array in arrays.items()}, expected)
    for name, array in arrays.items():
        require_finite(torch.from_numpy(array), name, item)
        if not name.endswith("bias") and not array.any():
            raise UserError(f"{name} in {item} is all zeros, as if its file were missing: copy it again")

    def read_leaf(leaf: str, layer: int | None) -> Float[np.ndarray, "..."]:
        if layer is None:
            return arrays[OTHERS[leaf]]
        module, _, kind = leaf.removeprefix("layers/").rpartition("/")
        values = arrays[f"block_{layer}/{LAYER_MODULES[module]}/{kind}"]
        # Linen keeps the heads on an axis of their own, behind the input's or before the output's.
        if module in ("attn/q", "attn/k", "attn/v"):
            return values.reshape(*values.shape[:-2], config.d_model)
        if module == "attn/o" and kind == "kernel":
            return values.reshape(config.d_model, config.d_model)
        return values

    return Imported(config, assemble(config, read_leaf))


def _find_item(path: Path) -> Path | None:
    """The folder of arrays that `path` means: itself, an item in it, or one in its newest step."""
    steps = [folder for folder in path.glob("*") if folder.name.isdigit()]
    folder = max(steps, key=lambda step: int(step.name)) if steps else path
    items = [folder, *sorted(path for path in folder.glob("*") if path.is_dir())]
    return next((item for item in items if (item / ORBAX).exists()), None)


def _load(item: Path) -> dict[str, np.ndarray]:
    """The arrays of the model, by their paths under `params`."""
    import orbax.checkpoint as ocp

    handler = ocp.PyTreeCheckpointHandler()
    _ignore_closed_loops()
    try:
        tree = handler.metadata(item.absolute()).tree
        if not isinstance(tree, dict) or "params" not in tree:
            raise UserError(f"{item} is not an original MTLM2: it holds no `params`")
        wanted = {"params": tree["params"]}
        numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), wanted)
        args = ocp.args.PyTreeRestore(item=wanted, restore_args=numpy, partial_restore=True)
        with ocp.Checkpointer(handler) as checkpointer:
            params = checkpointer.restore(item.absolute(), args=args)["params"]
    except (ValueError, OSError, KeyError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{item}: Orbax cannot read it ({reason}): copy it again from its source") from error
    arrays, _ = flatten(params.get("params", params))  # the former where all of `init`'s result was kept
    # Learned positions are a table or a bare parameter, with or without an axis for the batch.
    if "pos_emb/embedding" in arrays:
        arrays["pos_emb"] = arrays.pop("pos_emb/embedding")
    if "pos_emb" in arrays and arrays["pos_emb"].ndim == 3 and len(arrays["pos_emb"]) == 1:
        arrays["pos_emb"] = arrays["pos_emb"][0]
    for name, array in arrays.items():
        require_type(array.dtype.name, name, item)
    return {name: array.astype(np.float32, copy=False) for name, array in arrays.items()}


def _ignore_closed_loops() -> None:
    """Has Python say nothing of what Orbax leaves behind when an array cannot be read.

    It reads many at once on an event loop, and gives the first failure on; the others then end on a loop that
    is closed, at any time later, each with a traceback on stderr.
    """
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    before = sys.unraisablehook

    def hook(lost: Any) -> None:
        if not (isinstance(lost.exc_value, RuntimeError) and str(lost.exc_value) == "Event loop is closed"):
            before(lost)

    sys.unraisablehook = hook


def _config(item: Path, arrays: dict[str, np.ndarray]) -> ModelConfig:
    """Every size, from the arrays."""
    query, mlp = f"block_0/{LAYER_MODULES['attn/q']}/kernel", f"block_0/{LAYER_MODULES['mlp/up']}/kernel"
    for name, ndim in (("tok_emb/embedding", 2), ("pos_emb", 2), (query, 3), (mlp, 2)):
        if name not in arrays or arrays[name].ndim != ndim:
            raise UserError(f"{item} is not an original MTLM2: {name} is missing or has not {ndim} axes")
    layers = {int(match[1]) for name in arrays if (match := re.match(r"block_(\d+)/", name))}
    vocab, d = arrays["tok_emb/embedding"].shape
    return ModelConfig(
        vocab_size=vocab, context=arrays["pos_emb"].shape[0], d_model=d, n_layers=len(layers),
        n_heads=arrays[query].shape[1], d_mlp=arrays[mlp].shape[1],
        positions="learned", mlp="gelu", biases=True, tied=False, norm_eps=NORM_EPS,
    )  # fmt: skip


def _expected(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every array that an original MTLM2 of these sizes has."""
    d, f, heads = config.d_model, config.d_mlp, (config.n_heads, config.head_size)
    shapes: dict[str, tuple[int, ...]] = {
        "tok_emb/embedding": (config.vocab_size, d),
        "pos_emb": (config.context, d),
    }
    for layer in range(config.n_layers):
        of_layer: dict[str, tuple[int, ...]] = {"RMSNorm_0/scale": (d,), "RMSNorm_1/scale": (d,)}
        for name in ("query", "key", "value"):
            of_layer |= {f"{ATTENTION}/{name}/kernel": (d, *heads), f"{ATTENTION}/{name}/bias": heads}
        of_layer |= {f"{ATTENTION}/out/kernel": (*heads, d), f"{ATTENTION}/out/bias": (d,)}
        of_layer |= {"Dense_0/kernel": (d, f), "Dense_0/bias": (f,)}
        of_layer |= {"Dense_1/kernel": (f, d), "Dense_1/bias": (d,)}
        shapes |= {f"block_{layer}/{name}": shape for name, shape in of_layer.items()}
    return shapes | {"norm_f/scale": (d,), "head/kernel": (d, config.vocab_size)}
