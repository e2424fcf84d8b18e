"""`python -m stacking.grow RUN_OR_STEP`: a deeper model out of a trained one, ready to train on.

The whole training state grows: parameters, optimizer moments, counters, and the place in the data. `python -m
train_tpu.run --out DIR` goes on with the new run folder and needs nothing else. The folder appears when it is
complete and verified, or not at all. Growing moves bytes, so it runs on the CPU, whatever the machine has.
"""

import dataclasses
import functools
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import tyro
from rich.table import Table

from core import checks, cli
from core.checkpoint import Manifest, find_step, load_manifest, verify
from core.compilation_cache import keep_compiled
from core.config import PRESETS, ModelConfig, training_flags
from core.errors import UserError, run_command
from core.folder_kinds import Kind, require_kind
from core.folders import new_folder
from core.manifest import sync_path
from core.memory import peak_memory
from core.run.log import carry_log
from core.run.schedule import learning_rate
from core.steps import step_path, tokenizer_carriers
from core.tokenizer import TOKENIZER_FILE, load_tokenizer_of
from stacking.plan import Operator, custom_plan, make_plan
from stacking.policy import continue_schedule, describe_schedule, parse_schedule, require_safe
from stacking.rewrite import Growth
from train_tpu import config as settings
from train_tpu.config import ModelOverrides, RunConfig
from train_tpu.progress import make_console
from train_tpu.run_folder import write_config


@dataclasses.dataclass(frozen=True)
class GrowConfig:
    """Grow a trained model in depth: its layers are copied by a plan, its whole training state with them."""

    source: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN_OR_STEP")]
    """A run folder (its newest checkpoint), one step of it, or imported parameters."""
    out: Path | None = None
    """The new run folder; it must not exist. Default: the run's, with -grown behind it."""
    op: Operator = "stack"
    """stack: copies on top of each other. interleave: every layer beside its copy. overlap: two copies
    without the seam's layers. middle: the middle block twice. identity: added layers do nothing at first, so
    the loss stays what it is. random: added layers are newly drawn (a control)."""
    factor: float | None = None
    """New layers / old layers. Default: 2; 1.5 for overlap and middle."""
    layers: str | None = None
    """A plan of your own instead of --op: old layers in their new order, both ends of a range included, as in
    0-11,4-11 or 0-11,0-11:identity or 0-11,0-11:fresh."""
    optimizer: Literal["copy", "reset"] = "copy"
    """Moments and counters: grown with the parameters, or as at the start of training."""
    schedule: str = "rewarm"
    """rewarm:N: the schedule goes on, re-warmed over N steps (rewarm: 200, or a quarter of the steps left if
    that is less). keep: it goes on as if nothing had happened. restart: it begins anew, warmup and all."""
    steps: int | None = None
    """Updates in all, those made so far included. Default: as the run had it."""
    tokenizer: str | None = None
    """The run's tokenizer.json, where neither the run nor its old path has it."""
    dry_run: bool = False
    """Say what would be done, and write nothing."""
    force: bool = False
    """Also combine policies that make the first updates too large."""

    def __post_init__(self) -> None:
        checks.counts(steps=self.steps)
        checks.positive(factor=self.factor)


def main() -> int:
    """Runs the command; returns its exit code."""
    started = time.monotonic()
    jax.config.update("jax_platforms", "cpu")
    console = make_console()
    say = functools.partial(console.print, markup=False, highlight=False, soft_wrap=True)
    config = cli.parse(GrowConfig, prog="python -m stacking.grow", description=GrowConfig.__doc__)
    keep_compiled()

    # 1. What is grown, and by which plan.
    require_kind(config.source, "grow", Kind.JAX)
    step_dir = find_step(config.source)
    manifest = load_manifest(step_dir)
    model = source_model(step_dir, manifest)
    if config.layers is not None:
        if config.factor is not None:
            raise UserError("--layers is the whole plan: leave --factor out")
        plan = custom_plan(config.layers, model.n_layers)
    else:
        plan = make_plan(config.op, model.n_layers, config.factor)
    models = (model, dataclasses.replace(model, n_layers=plan.n_layers))
    say(plan.picture())

    # 2. How its training goes on.
    runs = None
    if manifest.kind == "train":
        run = settings.unflatten(manifest.config["run"])
        left = (run.steps if config.steps is None else config.steps) - manifest.step
        schedule = parse_schedule(config.schedule, left)
        require_safe(config.optimizer, schedule, run.optim.warmup, config.force)
        grown_run = continue_schedule(run, manifest.step, schedule, config.steps, str(config.source))
        runs = (run, with_model(grown_run, models[1]))
    carriers = tokenizer_carriers(step_dir)
    tokenizer = load_tokenizer_of(manifest.tokenizer, carriers, str(step_dir), config.tokenizer)
    growth = Growth(step_dir, manifest, plan, models, runs, config.optimizer == "reset", tokenizer)
    record = lineage_record(config, growth)
    console.print(describe(growth, record))
    out = config.out or default_out(step_dir)
    if config.dry_run:
        say(f"dry run: {out} was not written")
        return 0

    # 3. The new folder, under a hidden name until all of it is written and verified.
    with new_folder(out) as folder:
        verify(step_dir)
        growth.check_source()
        probe, what = growth.probe()
        say(f"probe: {what}")
        target = step_path(folder / "checkpoints", manifest.step) if runs else folder
        written, grown = growth.write(target, record, probe)
        n_leaves = growth.verify(target, grown)
        if runs:
            tokenizer.carry(folder)
            finish_run_folder(folder, step_dir, written)

    # 4. What was done, and what to type next.
    before, after = written.lineage[-1]["probe"]["loss"]
    change = "equal to the bit, as it must be" if plan.preserves else f"{after - before:+.4f}"
    following = ["--out", out]
    if not runs:
        named = tokenizer.name if tokenizer.content is None else out / TOKENIZER_FILE
        flags = [*training_flags(models[1]).split(), "--tokenizer", named]
        following = ["--init-from", out, *flags, "--data", "DATA"]
    say(
        f"verified: {n_leaves} leaves against their sources, to the bit\n"
        f"loss of the probe: {before:.4f} before, {after:.4f} after ({change})\n"
        f"took {time.monotonic() - started:.1f} s and {peak_memory() / 2**30:.2f} GiB of memory at most\n"
        f"next: {cli.command('train_tpu.run', *following)}"
    )
    return 0


def source_model(step_dir: Path, manifest: Manifest) -> ModelConfig:
    """The model that a manifest describes."""
    try:
        return ModelConfig(**manifest.config["model"])
    except (KeyError, TypeError) as error:
        raise UserError(
            f"{step_dir} does not say which model it holds ({error}): grow a checkpoint that train_tpu.run "
            "or an import wrote"
        ) from None


def with_model(run: RunConfig, model: ModelConfig) -> RunConfig:
    """The settings for another depth: by the preset that is just this model, else by --n-layers."""
    for name, preset in PRESETS.items():
        if dataclasses.replace(preset, vocab_size=model.vocab_size) == model:
            return dataclasses.replace(run, preset=name, model=ModelOverrides())
    return dataclasses.replace(run, model=dataclasses.replace(run.model, n_layers=model.n_layers))


def lineage_record(config: GrowConfig, growth: Growth) -> dict[str, Any]:
    """What the grown checkpoint's manifest says of its origin; the probe's losses are added when measured."""
    manifest, plan = growth.manifest, growth.plan
    return {
        "operation": "grow",
        "plan": plan.name,
        "layers": [plan.n_source, plan.n_layers],
        "sources": list(plan.sources),
        "how": list(plan.how),
        "optimizer": config.optimizer,
        "schedule": config.schedule,
        "path": str(growth.step_dir),
        "step": manifest.step,
        "sequences": manifest.sequences,
        "tokens": manifest.tokens,
        "flops": training_flops(manifest, growth.models[0]),
        "parameters": [model.n_params for model in growth.models],
        "model": [dataclasses.asdict(model) for model in growth.models],
        "source_files": {name: entry["sha256"] for name, entry in manifest.files.items()},
        "source_code": manifest.code,
    }


def training_flops(manifest: Manifest, model: ModelConfig) -> int:
    """FLOPs of a run up to a checkpoint; `model` is what it has trained since it was last grown."""
    earlier = manifest.last_growth or {"tokens": 0, "flops": 0}
    return earlier["flops"] + (manifest.tokens - earlier["tokens"]) * model.flops_per_token()


def default_out(step_dir: Path) -> Path:
    """The folder of the run that a step belongs to, with -grown behind its name."""
    run = run_folder(step_dir)
    return run.with_name(f"{run.name}-grown")


def run_folder(step_dir: Path) -> Path:
    """RUN of RUN/checkpoints/STEP; a step that lies elsewhere stands for itself."""
    return step_dir.parent.parent if step_dir.parent.name == "checkpoints" else step_dir


def describe(growth: Growth, record: dict[str, Any]) -> Table:
    """The table of before and after."""
    table = Table("", "before", "after", box=None, padding=(0, 2, 0, 0))

    def row(what: str, values: Iterable[str]) -> None:
        table.add_row(what, *values)

    row("layers", (str(m.n_layers) for m in growth.models))
    row("parameters", (f"{m.n_params:,}" for m in growth.models))
    row("without embeddings", (f"{m.n_params - m.n_embedding_params:,}" for m in growth.models))
    row("MFLOPs a training token", (f"{m.flops_per_token() / 1e6:,.1f}" for m in growth.models))
    if growth.runs:
        step = growth.manifest.step
        row("step", (f"{step:,} of {run.steps:,}" for run in growth.runs))
        row("tokens so far", [f"{growth.manifest.tokens:,}"] * 2)
        row("training FLOPs so far", [f"{record['flops']:.3g}"] * 2)
        row("learning rate here", (f"{learning_rate(run.optim, step, run.steps):.3g}" for run in growth.runs))
        row("schedule", map(describe_schedule, growth.runs))
    return table


def finish_run_folder(folder: Path, step_dir: Path, grown: Manifest) -> None:
    """What makes a checkpoint a run: config.json, and the history of the run that was grown."""
    if grown.data is None:
        raise AssertionError(f"{step_dir} is a run's checkpoint without data")
    record = {
        "run": grown.config["run"],
        "model": grown.config["model"],
        "tokenizer": grown.tokenizer,
        "data": {"path": grown.config["run"]["data"], "fingerprint": grown.data["fingerprint"]},
    }
    write_config(folder, record)
    carry_log(run_folder(step_dir), folder, grown.step)
    for path in (folder / "checkpoints", folder):
        sync_path(path)


if __name__ == "__main__":
    run_command(main)
