"""The settings of a run that the other engine has trained so far, as the one that continues it has them.

A run folder has one record of its settings, in config.json. What both engines have stays as it is; what says
how one of them computes the same updates is left to the other, and found again where a run comes back.
"""

from typing import Any

from core.checkpoint.manifest import JAX, TORCH
from core.config import PRESETS, ModelConfig, nearest_preset, typed_value
from core.run.settings import FROM_PRESET, current_names
from core.tokenizer import BUILT_IN

# How an engine computes the same updates. The other one has none of these, or means something else by them.
ENGINE_SETTINGS = frozenset((
    "grad_accum_steps", "mesh", "show_sharding", "attention", "unroll", "remat", "loss_chunk", "coordinator",
    "num_processes", "process_id", "device", "kernels", "compile",
    "recompile",
))  # fmt: skip
# What PyTorch's trainer takes from a folder that it starts from, and JAX's has to be told.
FROM_FOLDER = frozenset(("init_from", "preset", "tokenizer", "vocab_size", *FROM_PRESET))
KEPT = "other_engine"  # field of config.json: those that the other engine last had


def engine_of(run: dict[str, Any]) -> str:
    """Which engine recorded the settings of a run."""
    return TORCH if "compile" in run else JAX


def settings_for(engine: str, record: dict[str, Any]) -> dict[str, Any]:
    """The settings of a run's record as `engine` continues it: its own, if it wrote the record.

    Args:
        record: of config.json, or what a manifest has of it: `run`, `model` and `tokenizer`.
    """
    run = current_names(record["run"])
    if engine_of(run) == engine:
        return run
    shared = {name: value for name, value in run.items() if name not in ENGINE_SETTINGS}
    if engine == JAX and run.get("init_from"):
        shared |= _own_model(record)
    return shared | {"init_from": None} | record.get(KEPT, {})


def _own_model(record: dict[str, Any]) -> dict[str, Any]:
    """What says a model and tokenizer that PyTorch's trainer took from the folder it started from."""
    model, tokenizer = ModelConfig(**record["model"]), record["tokenizer"]
    name = nearest_preset(model)
    values = {field: typed_value(model, field) for field in FROM_PRESET}
    given = {field: value for field, value in values.items() if value != typed_value(PRESETS[name], field)}
    rows = None if model.vocab_size == tokenizer["vocab_size"] else model.vocab_size
    overrides = dict.fromkeys(FROM_PRESET) | given | {"preset": name, "vocab_size": rows}
    built_in = tokenizer["name"] in BUILT_IN
    return overrides | ({"tokenizer": tokenizer["name"]} if built_in else {})


def kept_of_other(old: dict[str, Any] | None, record: dict[str, Any]) -> dict[str, Any]:
    """What a new config.json keeps of the one before it, for the other engine: a field, or none."""
    if old is None:
        return {}
    if engine_of(old["run"]) == engine_of(record["run"]):
        return {KEPT: old[KEPT]} if KEPT in old else {}
    from_folder = engine_of(old["run"]) == TORCH and old["run"].get("init_from")
    names = ENGINE_SETTINGS | (FROM_FOLDER if from_folder else frozenset())
    return {KEPT: {name: value for name, value in old["run"].items() if name in names}}
