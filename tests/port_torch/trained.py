"""Really trained models of seconds, their exports, and what three implementations compute from them."""

from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from core.checkpoint.checkpointer import restore_params
from core.checkpoint.manifest import load_manifest
from core.checkpoint.steps import find_step
from core.config import ModelConfig
from core.model import Params, abstract_params
from tests.train_tpu.processes import TINY, run_here, without

KINDS = ("llama", "gpt")


def train(cache: Path, text: Path, kind: str, tokenizer: str = "bytes", context: int = 96) -> Path:
    """Trains 40 updates of a tiny model of that kind, and gives its run folder."""
    out = cache / f"run-{kind}-{tokenizer}-{context}"
    arguments = list(TINY)
    for flag in ("--preset", "--steps", "--dropout", "--context", "--window", "--tokenizer"):
        arguments = without(arguments, flag)
    preset = {"llama": "mtlm1-tiny", "gpt": "mtlm2-tiny"}[kind]
    run_here(
        *arguments, "--preset", preset, "--tokenizer", tokenizer, "--context", str(context),
        "--steps", "40", "--save-every", "40", "--eval-every", "40", "--sample-every", "0",
        "--data", text, "--out", out,
    )  # fmt: skip
    return out


def open_run(out: Path) -> tuple[ModelConfig, Params]:
    """The configuration and the parameters of a run's newest checkpoint."""
    step_dir = find_step(out)
    model = ModelConfig(**load_manifest(step_dir).config["model"])
    return model, restore_params(step_dir, abstract_params(model))


def transformers_model(folder: Path) -> torch.nn.Module:
    """What a user of transformers gets, in float32."""
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)


def transformers_logits(folder: Path, tokens: np.ndarray) -> np.ndarray:
    """Its logits, [B, S, V]."""
    with torch.inference_mode():
        return transformers_model(folder)(torch.tensor(tokens, dtype=torch.long)).logits.numpy()
