"""What `--help` of the commands that train shows: the options by subject, with the preset's own values."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from core.cli import asks_for_help
from core.config import preset
from core.help import Groups
from core.run.presets import TRAINING_DEFAULTS
from core.run.rates import preset_rate
from core.run.settings import FROM_PRESET, given_value, model_config

TRAINING_OPTIONS: Groups = {
    "options": ("preset", "data", "out", "steps", "batch", "lr"),
    "data": (
        "weights", "phases", "tokenizer", "chat", "template", "validation", "on_bad_record", "leave_out",
        "document_mask",
    ),
    "length and batch": ("epochs", "steps", "stop_at", "grad_accum_steps", "seed"),
    "optimizer": (
        "optimizer", "weight_decay", "clip", "schedule", "warmup", "decay", "decay_shape", "final_lr",
    ),
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


def for_help(config: Any, argv: Sequence[str], from_preset: bool = True) -> Any:
    """`config` as the defaults of a command line: with the preset's own values where help is asked for.

    Otherwise what is not given stays None, so that a command can tell it from what is.

    from_preset: whether model and length are the preset's, and not those of what training starts from.
    """
    if not asks_for_help(argv):
        return config
    shown, given = config, TRAINING_DEFAULTS[config.preset]
    if from_preset:
        model = dataclasses.asdict(model_config(config, preset(config.preset).vocab_size))
        overrides = dataclasses.replace(config.model, **{name: model[name] for name in FROM_PRESET})
        shown = dataclasses.replace(shown, model=overrides)
    if from_preset and shown.steps is None and shown.epochs is None:
        shown = dataclasses.replace(shown, steps=given.get("steps"), epochs=given.get("epochs"))
    if shown.optim.lr is None:
        lr = preset_rate(config.preset, given_value(argv, "--optimizer") or config.optim.optimizer)
        shown = dataclasses.replace(shown, optim=dataclasses.replace(shown.optim, lr=lr))
    return shown
