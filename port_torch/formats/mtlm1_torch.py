"""The original MTLM1's checkpoints: a .pt file with packed queries, keys and values and interleaved RoPE.

The original turns neighbouring elements (2i, 2i + 1) of a head by one angle, core.model the elements i and
i + K/2. Reordering the rows of the query and key maps carries one into the other: every score is the same sum
in another order.
"""

import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float

from core.config import ModelConfig
from core.errors import UserError
from port_torch.folder import PICKLES, require_finite, require_tensors
from port_torch.formats.imported import Imported, assemble

NAME = "mtlm1-torch"
# What the original fixes and its tensors do not tell.
HEAD_SIZE, CONTEXT, ROPE_THETA, NORM_EPS = 64, 1024, 10_000.0, 1e-6

EMBEDDING, HEAD = "tok_emb.weight", "lm_head.weight"
LAYER_TENSORS = {  # leaf -> the original's name within a layer, and the part of the packed one
    "attn_norm/scale": ("norm1", None),
    "attn/q/kernel": ("attn.qkv", 0),
    "attn/k/kernel": ("attn.qkv", 1),
    "attn/v/kernel": ("attn.qkv", 2),
    "attn/o/kernel": ("attn.o_proj", None),
    "mlp_norm/scale": ("norm2", None),
    "mlp/gate/kernel": ("mlp.w1", None),
    "mlp/up/kernel": ("mlp.w2", None),
    "mlp/down/kernel": ("mlp.w3", None),
}
ROTATED = ("attn/q/kernel", "attn/k/kernel")
PICKLED = pickle.PROTO  # the first byte of every pickle that PyTorch has written


def recognizes(path: Path) -> bool:
    """Whether `path` is a file of PyTorch's."""
    return path.is_file() and path.suffix in PICKLES


def read(path: Path, n_heads: int | None = None, context: int | None = None) -> Imported:
    """Reads the weights from a checkpoint, which may hold more (an optimizer's state, a step).

    n_heads, context: what no tensor tells; None: the original's (heads of 64 elements, 1024 positions).

    Raises:
        UserError: the file is damaged, holds more than tensors and plain values, or is of another model.
    """
    tensors = _state_dict(path)
    config = _config(path, tensors, n_heads, context)
    require_tensors(path, {name: tuple(t.shape) for name, t in tensors.items()}, _expected(config))
    for name, tensor in tensors.items():
        require_finite(tensor, name, path)
    if not torch.equal(tensors[EMBEDDING], tensors[HEAD]):
        raise UserError(f"{HEAD} and {EMBEDDING} in {path} differ, and the original MTLM1 ties them")

    def read_leaf(leaf: str, layer: int | None) -> Float[np.ndarray, "..."]:
        if layer is None:
            name = {"embed/table": EMBEDDING, "norm/scale": "norm_f.weight"}[leaf]
            return _values(tensors[name])
        module, part = LAYER_TENSORS[leaf.removeprefix("layers/")]
        values = _values(tensors[f"layers.{layer}.{module}.weight"])
        if part is not None:
            values = values[part * config.d_model : (part + 1) * config.d_model]
        if leaf.endswith(ROTATED):
            values = split_halves(values, config.n_heads)
        return values.T

    assumed = []
    if n_heads is None:
        assumed.append(f"{config.n_heads} heads of {HEAD_SIZE} elements (--n-heads)")
    if context is None:
        assumed.append(f"a context of {CONTEXT} tokens (--context)")
    return Imported(config, assemble(config, read_leaf), assumed=" and ".join(assumed) or None)


def split_halves(rows: Float[np.ndarray, "D E"], n_heads: int) -> Float[np.ndarray, "D E"]:
    """The rows of a query or key map, within each head from (0, 1), (2, 3), ... to evens, then odds."""
    d, width = rows.shape
    return rows.reshape(n_heads, d // n_heads // 2, 2, width).swapaxes(1, 2).reshape(d, width)


def _state_dict(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of the model, by their names without what wrappers (compile, DDP) put before them."""
    with path.open("rb") as file:
        pickled = file.read(1) == PICKLED
    try:
        zipped = zipfile.is_zipfile(path)
        if not zipped and not pickled:  # a page of a website, or what Git has of a large file
            raise ValueError("it is neither a zip archive nor a pickle")
        if zipped and (bad := zipfile.ZipFile(path).testzip()):
            raise UserError(f"{path} was changed: {bad} in it does not match its checksum; copy it again")
        # Mapped, so that memory holds what is read of it, and not an optimizer's state.
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path} holds more than tensors and plain values, and opening such a file can run arbitrary "
            f"code, so it is not opened: save its state_dict alone, `torch.save(model.state_dict(), FILE)`"
        ) from error
    except (UserError, MemoryError):
        raise
    except Exception as error:  # a damaged pickle ends in whatever its bytes happen to say
        raise UserError(f"{path} is not a whole file of PyTorch's ({error}): copy it again") from error
    tensors = _named_tensors(content)
    for inner in ("model", "model_state_dict", "state_dict"):
        if EMBEDDING not in tensors and isinstance(content, dict):
            tensors = _named_tensors(content.get(inner))
    if EMBEDDING not in tensors:
        keys = ", ".join(map(str, content)) if isinstance(content, dict) else type(content).__name__
        raise UserError(f"{path} is not an original MTLM1: it has no {EMBEDDING} (it holds {keys[:200]})")
    return tensors


def _named_tensors(content: Any) -> dict[str, torch.Tensor]:
    if not isinstance(content, dict):
        return {}
    return {
        re.sub(r"^((_orig_mod|module)\.)+", "", str(name)): value
        for name, value in content.items()
        if isinstance(value, torch.Tensor)
    }


def _config(
    path: Path, tensors: dict[str, torch.Tensor], n_heads: int | None, context: int | None
) -> ModelConfig:
    """The sizes, from the tensors as far as they tell."""
    layers = {int(match[1]) for name in tensors if (match := re.match(r"layers\.(\d+)\.", name))}
    gate = tensors.get("layers.0.mlp.w1.weight")
    if gate is None or gate.ndim != 2 or tensors[EMBEDDING].ndim != 2:
        raise UserError(f"{path} is not an original MTLM1: layers.0.mlp.w1.weight is missing or not a matrix")
    vocab, d = tensors[EMBEDDING].shape
    if n_heads is None and d % HEAD_SIZE:
        raise UserError(
            f"{path} has width {d}, which is not divisible by heads of {HEAD_SIZE}: give --n-heads"
        )
    return ModelConfig(
        vocab_size=vocab,
        context=CONTEXT if context is None else context,
        d_model=d,
        n_layers=len(layers),
        n_heads=d // HEAD_SIZE if n_heads is None else n_heads,
        d_mlp=gate.shape[0],
        rope_theta=ROPE_THETA,
        norm_eps=NORM_EPS,
    )


def _expected(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor that an original MTLM1 of these sizes has."""
    d, f = config.d_model, config.d_mlp
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (config.vocab_size, d)}
    for layer in range(config.n_layers):
        of_layer = {
            "norm1": (d,), "attn.qkv": (3 * d, d), "attn.o_proj": (d, d),
            "norm2": (d,), "mlp.w1": (f, d), "mlp.w2": (f, d), "mlp.w3": (d, f),
        }  # fmt: skip
        shapes |= {f"layers.{layer}.{module}.weight": shape for module, shape in of_layer.items()}
    return shapes | {"norm_f.weight": (d,), HEAD: (config.vocab_size, d)}


def _values(tensor: torch.Tensor) -> Float[np.ndarray, "..."]:
    return tensor.float().numpy()
