"""What one growth will do: which checkpoint, by which plan, and how its training continues.

Everything is decided and refused here, before JAX is imported and before anything is written.
"""

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.checkpoint.manifest import Manifest, load_manifest
from core.checkpoint.steps import find_step, run_folder, tokenizer_carriers
from core.config import PRESETS, ModelConfig
from core.console import Table
from core.errors import UserError
from core.folder_kinds import Kind, require_kind
from core.folders import require_new
from core.run.other_engine import settings_for
from core.run.settings import ModelOverrides, unflatten
from core.run.steering import Steered, steered
from core.tokenizer import Tokenizer, load_tokenizer_of
from stacking.advise.verdict import advice_at
from stacking.plan import Plan, choose_plan
from stacking.schedule import continue_schedule, describe_schedule, parse_schedule, require_safe
from train_tpu.config import RunConfig

if TYPE_CHECKING:
    from stacking.grow import GrowConfig


@dataclasses.dataclass(frozen=True)
class Growth:
    """One growth of one checkpoint: everything decided, nothing written yet."""

    step_dir: Path
    manifest: Manifest
    """Of the step that is grown."""
    plan: Plan
    models: tuple[ModelConfig, ModelConfig]
    """Before and after."""
    runs: tuple[RunConfig, RunConfig] | None
    """The settings before and after; None for parameters alone, which is what a run on rows is grown as."""
    schedule: str
    """As --schedule gives it."""
    reset_optimizer: bool
    tokenizer: Tokenizer
    out: Path
    """The new run folder, or the new folder of parameters."""
    advice: list[dict[str, Any]]
    """What stacking.advise answered at this checkpoint."""

    def lineage_record(self) -> dict[str, Any]:
        """What the grown checkpoint's manifest says of its origin, but for the probe's losses."""
        manifest, plan = self.manifest, self.plan
        record = {
            "operation": "grow",
            "plan": plan.name,
            "layers": [plan.n_source, plan.n_layers],
            "sources": list(plan.sources),
            "how": list(plan.how),
            "optimizer": "reset" if self.reset_optimizer else "copy",
            "schedule": self.schedule,
            "path": str(self.step_dir),
            "step": manifest.step,
            "sequences": manifest.sequences,
            "tokens": manifest.tokens,
            "flops": training_flops(manifest, self.models[0]),
            "parameters": [model.n_params for model in self.models],
            "model": [dataclasses.asdict(model) for model in self.models],
            "source_files": {name: entry["sha256"] for name, entry in manifest.files.items()},
            "source_code": manifest.code,
        }
        return record | {"advice": self.advice} if self.advice else record

    def describe(self) -> Table:
        """The table of before and after."""
        table = Table(("", "before", "after"), ruled=False)

        def row(what: str, values: Iterable[str]) -> None:
            table.add_row(what, *values)

        row("layers", (str(m.n_layers) for m in self.models))
        row("parameters", (f"{m.n_params:,}" for m in self.models))
        row("without embeddings", (f"{m.n_params - m.n_embedding_params:,}" for m in self.models))
        row("MFLOPs per training token", (f"{m.flops_per_token() / 1e6:,.1f}" for m in self.models))
        if self.runs:
            step = self.manifest.step
            rates = (steered_settings(run, self.manifest).lr(step) for run in self.runs)
            row("step", (f"{step:,} of {run.steps:,}" for run in self.runs))
            row("tokens so far", [f"{self.manifest.tokens:,}"] * 2)
            row("training FLOPs so far", [f"{training_flops(self.manifest, self.models[0]):.3g}"] * 2)
            row("learning rate here", (f"{rate:.3g}" for rate in rates))
            row("schedule", map(describe_schedule, self.runs))
        for entry in self.advice:
            row("stacking.advise said", ("", f"{entry['advice']} ({entry['layers'][1]} layers)"))
        return table


def decide(config: "GrowConfig") -> Growth:
    """The growth that the command line asks for.

    Raises:
        UserError: the checkpoint cannot be grown like that, or there is no place for the result.
    """
    # 1. What is grown, and by which plan.
    require_kind(config.source, "grow", Kind.CHECKPOINT)
    step_dir = find_step(config.source)
    out = config.out or default_out(step_dir)
    if not config.dry_run:
        require_new(out)
    manifest = load_manifest(step_dir)
    model = source_model(step_dir, manifest)
    plan = choose_plan(config.op, config.factor, config.layers, model.n_layers)
    models = (model, dataclasses.replace(model, n_layers=plan.n_layers))

    # 2. How its training continues.
    runs = None
    if manifest.kind == "train" and "preset" in manifest.config["run"]:
        run = run_settings(step_dir, manifest)
        left = (run.steps if config.steps is None else config.steps) - manifest.step
        schedule = parse_schedule(config.schedule, left)
        require_safe(config.optimizer, schedule, run.optim.warmup, config.force)
        grown_run = continue_schedule(run, manifest.step, schedule, config.steps, str(config.source))
        runs = (run, with_model(grown_run, models[1]))
    carriers = tokenizer_carriers(step_dir)
    tokenizer = load_tokenizer_of(manifest.tokenizer, carriers, str(step_dir), config.tokenizer)
    reset = config.optimizer == "reset"
    advice = advice_at(run_folder(step_dir), step_dir)
    return Growth(step_dir, manifest, plan, models, runs, config.schedule, reset, tokenizer, out, advice)


def source_model(step_dir: Path, manifest: Manifest) -> ModelConfig:
    """The model that a manifest describes."""
    try:
        return ModelConfig(**manifest.config["model"])
    except (KeyError, TypeError) as error:
        raise UserError(
            f"{step_dir} does not say which model it holds ({error}): grow a checkpoint that train_tpu.run "
            "or an import wrote"
        ) from None


def run_settings(step_dir: Path, manifest: Manifest) -> RunConfig:
    """The settings of the run that a manifest is of, whichever engine wrote it."""
    if "preset" not in manifest.config["run"]:
        raise UserError(
            f"{step_dir} is of a run on rows, which does not continue deeper: grow it with stacking.grow, "
            "which takes its parameters alone"
        )
    record = manifest.config | {"tokenizer": manifest.tokenizer}
    return unflatten(settings_for(RunConfig.engine, record), RunConfig)


def steered_settings(run: RunConfig, manifest: Manifest) -> Steered:
    """The settings of the update after a checkpoint, as the run was steered up to there."""
    start = Steered(run.optim, run.guard, run.steps)
    return steered(start, manifest.steering or [], manifest.step)


def with_model(run: RunConfig, model: ModelConfig) -> RunConfig:
    """The settings for another depth: by the preset that is just this model, else by --n-layers."""
    for name, preset in PRESETS.items():
        if dataclasses.replace(preset, vocab_size=model.vocab_size) == model:
            return dataclasses.replace(
                run, preset=name, model=ModelOverrides(vocab_size=run.model.vocab_size)
            )
    return dataclasses.replace(run, model=dataclasses.replace(run.model, n_layers=model.n_layers))


def training_flops(manifest: Manifest, model: ModelConfig) -> int:
    """FLOPs of a run up to a checkpoint; `model` is what it has trained since it was last grown."""
    earlier = manifest.last_growth or {"tokens": 0, "flops": 0}
    return earlier["flops"] + (manifest.tokens - earlier["tokens"]) * model.flops_per_token()


def default_out(step_dir: Path) -> Path:
    """The folder of the run that a step belongs to, with -grown appended to its name."""
    run = run_folder(step_dir)
    return run.with_name(f"{run.name}-grown")
