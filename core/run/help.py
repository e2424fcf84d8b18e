"""What `--help` of the commands that train shows: the options by subject, with the preset's own values."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from core.cli import asks_for_help
from core.config import preset
from core.help import Groups
from core.run.presets import TRAINING_DEFAULTS
from core.run.settings import FROM_PRESET, model_config

TRAINING_OPTIONS: Groups = {
    "options": ("preset", "data", "out", "steps", "batch", "lr"),
    "data": (
        "weights", "phases", "tokenizer", "chat", "template", "validation", "on_bad_record", "leave_out",
        "document_mask",
    ),
    "length and batch": ("epochs", "steps", "stop_at", "grad_accum_steps", "seed"),
    "optimizer": ("optimizer", "weight_decay", "clip", "schedule", "warmup", "decay", "final_lr"),
    "model (changes to the preset)": (
        "context", "n_layers", "d_model", "n_heads", "n_kv_heads", "d_mlp", "mlp", "positions", "tied",
        "dropout",
    ),
    "LoRA": ("lora_rank", "lora_alpha", "lora_dropout", "lora_targets"),
    "evaluation and samples": (
        "eval_every", "eval_tasks", "eval_data_dir", "sample_every", "prompts", "log_every", "profile",
        "watch_every",
    ),
    "checkpoints": ("save_every", "save_minutes", "keep_last", "keep_every", "keep_steps"),
    "starting and resuming": ("init_from", "allow_change", "from_step", "fallback"),
    "devices and memory": ("device", "mesh", "dtype", "remat", "kernels", "compile", "deterministic"),
    "several processes": ("coordinator", "num_processes", "process_id"),
    "advanced: optimizer": (
        "adamw_lr_ratio", "beta1", "beta2", "eps", "momentum", "z_loss", "schedule_start", "rewarm",
        "rewarm_at",
    ),
    "advanced: guard against spikes": ("window", "sigma", "halt_after"),
    "advanced: model": (
        "vocab_size", "head_dim", "biases", "qkv_biases", "qk_norm", "rope_theta", "rope_scaling", "norm_eps",
        "init_std", "scaled_residual_init",
    ),
    "advanced: evaluation": ("eval_windows", "eval_questions"),
    "advanced: compiled step": ("attention", "unroll", "loss_chunk", "show_sharding", "recompile"),
}  # fmt: skip


def for_help(config: Any, argv: Sequence[str]) -> Any:
    """`config` as the defaults of a command line: with the preset's own values where help is asked for.

    Otherwise what is not given stays None, so that a command can tell it from what is.
    """
    if not asks_for_help(argv):
        return config
    model = dataclasses.asdict(model_config(config, preset(config.preset).vocab_size))
    overrides = dataclasses.replace(config.model, **{name: model[name] for name in FROM_PRESET})
    shown = dataclasses.replace(config, model=overrides)
    if shown.steps is None and shown.epochs is None:
        given = TRAINING_DEFAULTS[config.preset]
        shown = dataclasses.replace(shown, steps=given.get("steps"), epochs=given.get("epochs"))
    return shown
