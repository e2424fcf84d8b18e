"""The proof of an export: what a model loaded from the folder computes against what was computed before."""

from pathlib import Path

import numpy as np
import torch
import transformers
from transformers.utils.logging import disable_progress_bar

from core.config import ModelConfig
from core.errors import UserError
from core.progress import Activity
from port_torch.hf.modeling_mtlm import MtlmForCausalLM
from port_torch.hf_config import STOCK, stock_type
from port_torch.model import load

PROBE = (2, 128)  # sequences, tokens: enough to tell every convention apart, seconds for 200M parameters
EPSILON = 2.0**-24  # a float32 result is off by up to this part of itself


def probe_tokens(model: ModelConfig, first: int) -> np.ndarray:
    """The same random ids every time behind `first`, int64 [2, up to 128]."""
    shape = (PROBE[0], min(PROBE[1], model.context))
    tokens = np.random.default_rng(0).integers(0, model.vocab_size, shape)
    tokens[:, 0] = first
    return tokens


def compare(
    folder: Path, model: ModelConfig, tokens: np.ndarray, expected: np.ndarray, source: str = "Flax"
) -> None:
    """Loads the folder with our mirror and with transformers, computes in float32, and prints by how much the
    logits differ from `expected`, which `source` computed.

    Raises:
        UserError: one of them differs by more than rounding explains.
    """
    disable_progress_bar()
    ids = torch.from_numpy(tokens)
    stock = stock_type(model)
    kind = getattr(transformers, STOCK[stock]) if stock else MtlmForCausalLM
    with torch.inference_mode(), Activity(f"computing the logits of {folder}"):
        ours, noise = mirror_logits(folder, ids)
        theirs = kind.from_pretrained(folder, dtype=torch.float32)(ids, use_cache=False).logits.numpy()
    limit = tolerance(model, expected, noise)
    for name, got in (("port_torch.model", ours), ("transformers", theirs)):
        difference = require_equal(got, expected, limit, name, source)
        print(f"logits of {name} against {source}: largest difference {difference:.1e} (limit {limit:.1e})")


def require_equal(got: np.ndarray, expected: np.ndarray, limit: float, name: str, source: str) -> float:
    """The largest difference of logits that `name` computes from those of `source`; a UserError beyond the
    limit."""
    difference = float(np.abs(got - expected).max())
    if not difference <= limit:
        raise UserError(
            f"{name} computes logits from the exported folder that differ from {source}'s by up to "
            f"{difference:.1e} where {limit:.1e} is allowed, so the folder was removed; this is a fault "
            "of the export: please report it with the checkpoint's manifest"
        )
    return difference


def mirror_logits(folder: Path, ids: torch.Tensor) -> tuple[np.ndarray, float]:
    """Float32 logits [B, S, V] of the folder in our mirror, and how far they are off those of float64."""
    mirror = load(folder)
    single = mirror.logits(mirror(ids)).numpy()
    mirror = mirror.double()
    return single, float(np.abs(single - mirror.logits(mirror(ids)).numpy()).max())


def tolerance(model: ModelConfig, expected: np.ndarray, noise: float) -> float:
    """How far logits of the same weights may differ in float32.

    The folder's weights are exact on both sides, whatever their type, so that only the order of float32 sums
    differs. A sum of d products is off by about eps sqrt(d), and the errors of 2 L branches add up like
    sqrt(2 L): trained models (1.3M to 200M) differ by a quarter of that. Others make more of every rounding
    (after twelve updates at a high rate nine times as much), so `noise` counts, too, by how much the folder's
    float32 logits are off those of float64. Four times either is allowed: two such errors, whose largest of
    many is up to twice another's. A wrong theta, epsilon, order of weights or activation is hundreds of times
    beyond.
    """
    rounding = EPSILON * (2 * model.n_layers * model.d_model) ** 0.5 * max(1.0, float(np.abs(expected).max()))
    return 4 * max(rounding, noise)
