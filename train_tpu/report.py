"""What a run says before its first step and after its last."""

import importlib.util
from pathlib import Path

import jax
from jax.sharding import Mesh

from core.attention import Choice
from core.cli import command
from core.config import ModelConfig
from core.console import Table
from core.data.batches import Data
from core.data.conversations import Conversation
from core.data.tuning_rows import CHAT, Row, instruction
from core.model import Compute
from core.run.data import data_rows
from core.run.presets import Trained
from core.run.schedule import in_decay
from core.run.tuning_data import TuningData
from core.sharding import layouts, splits_weights
from train_tpu.backend import KernelsChoice
from train_tpu.config import FinetuneConfig, JaxSettings, RunConfig
from train_tpu.step import TrainState


def describe(
    config: JaxSettings,
    model: ModelConfig,
    about: list[tuple[str, str]],
    mesh: Mesh,
    compute: Compute,
    attention: Choice,
    kernels: KernelsChoice,
    by_documents: bool,
) -> Table:
    """The table a run begins with.

    about: its rows of model, data and training. by_documents: whether attention ends at documents.
    """
    device = mesh.devices.flat[0]
    along = f", {config.mesh}" if splits_weights(mesh) else ""
    if jax.process_count() > 1:
        along += f", of {jax.process_count()} processes"
    within = " within documents" if by_documents else ""
    rows = [
        *about,
        ("optimizer", f"{config.optim.optimizer}, peak lr {config.optim.lr:g}, {config.optim.schedule}, "
                      f"warmup {config.optim.warmup}"),
        ("devices", f"{mesh.size} x {device.device_kind} ({device.platform}){along}, {compute.dtype}"),
        ("attention", f"{attention.name}{within}: {attention.why}"),
        ("kernels", kernels.describe(model, mesh)),
    ]  # fmt: skip
    table = Table(("", ""), ruled=False)
    for row in rows:
        table.add_row(*row)
    return table


def pretraining_rows(
    config: RunConfig, model: ModelConfig, dataset: Data, steps: int, before: Trained
) -> list[tuple[str, str]]:
    """What the table says of a run that pretrains, and has been trained `before`."""
    read = before.sequences_at(steps, config.batch)
    epochs = f"{read / dataset.splits['train'].windows:.2f} epochs"
    return [
        ("model", f"{config.preset}: {model.summary}"),
        ("parameters", f"{model.n_params:,} ({model.n_params - model.n_embedding_params:,} without "
                       f"embeddings); {model.flops_per_token() / 1e6:,.1f} MFLOPs per training token"),
        ("tokenizer", "{name}, {vocab_size:,} ids".format(**dataset.tokenizer_record)),
        *data_rows(config, dataset, read),
        ("training", f"{before.describe(steps, config.batch, model.context)} tokens, {epochs}, "
                     f"{read * model.context / model.n_params:.1f} tokens per parameter"),
    ]  # fmt: skip


def tuning_rows(config: FinetuneConfig, data: TuningData, n_trained: int) -> list[tuple[str, str]]:
    """What the table says of a run on rows."""
    model, n = data.model, data.steps * config.batch
    return [
        ("model", model.summary),
        ("parameters", f"{model.n_params:,}, of which {n_trained:,} are trained"),
        *data.table,
        ("training", f"{data.steps:,} steps of {config.batch} x {model.context} = {n * model.context:,} "
                     f"places, {n / len(data.divided.train.tokens):.2f} epochs"),
    ]  # fmt: skip


def describe_layout(state: TrainState, mesh: Mesh) -> Table:
    """How every parameter is sharded over the devices, with the bytes of it and of its moments on each.

    state: arrays, or shapes and types.
    """
    table = Table(
        ("parameter", "shape", "sharding"), ("bytes per device", "with optimizer state"), ruled=False
    )
    moments = list(layouts(mesh, state.opt_state))
    totals = [0, 0]
    for leaf in layouts(mesh, state.params):
        its = sum(m.device_bytes for m in moments if m.path.endswith(f"/{leaf.path}"))
        sizes = [leaf.device_bytes, leaf.device_bytes + its]
        totals = [total + size for total, size in zip(totals, sizes, strict=True)]
        axes = ", ".join(axis or "-" for axis in leaf.spec) or "replicated"
        table.add_row(leaf.path, " x ".join(map(str, leaf.shape)), axes, *(f"{size:,}" for size in sizes))
    table.add_row("total", "", "", *(f"{total:,}" for total in totals))
    return table


def memory(step: jax.stages.Compiled) -> str:
    """Device memory of the compiled step: what it is given and what it works in."""
    analysis = step.memory_analysis()
    if analysis is None:
        return "an unknown amount of memory"
    total = analysis.argument_size_in_bytes + analysis.temp_size_in_bytes
    return f"{total / 2**30:.2f} GiB"


def next_commands(out: Path, config: RunConfig, steps: int, end: int) -> str:
    """What to type next; commands of packages that are not installed here are left out.

    A run that was stopped at `end` of its `steps`, before its decay, can be grown under its own schedule; one
    that has begun to decay needs a new one.
    """
    open_ended = end < steps and not in_decay(config.optim, end, steps)
    schedule = () if open_ended else ("--schedule", "restart", "--steps", end + steps)
    return to_type([
        ("generate text", "core.generate", (out, "--prompt", "The")),
        ("evaluate it", "eval.run", (out,)),
        (
            "train on your own text",
            "train_tpu.run",
            ("--preset", config.preset, "--data", "TEXT", "--out", "runs/mine"),
        ),
        ("grow it", "stacking.grow", (out, "--out", f"{out}-grown", *schedule)),
        ("convert it to PyTorch", "port_torch.convert", (out, f"{out}-torch")),
    ])  # fmt: skip


def commands_of_tuned(out: Path, form: str, shown: Row | Conversation, adapted: Path | None = None) -> str:
    """What to type next of a model tuned on rows of a form.

    shown: one of them. adapted: what adapters were trained for, if any were.
    """
    prompt = {"text": "The", "instruction": instruction("Name three colours.")}.get(form)
    if prompt is None and form != CHAT:
        prompt = shown.prompt
    asked = ("--chat",) if form == CHAT else ("--prompt", prompt)
    alone = (out, f"{out}-adapter", "--adapter-for", f"{adapted}-torch")
    return to_type([
        ("converse with it" if form == CHAT else "ask it", "core.generate", (out, *asked)),
        ("evaluate it", "eval.run", (out,)),
        ("convert it to PyTorch", "port_torch.convert", (out, f"{out}-torch")),
        *([("its adapters, for peft", "port_torch.convert", alone)] if adapted else []),
    ])  # fmt: skip


def to_type(commands: list[tuple[str, str, tuple]]) -> str:
    """Lines with commands: what each does, its module and its arguments."""
    lines = ["next:"]
    for what, module, arguments in commands:
        if importlib.util.find_spec(module.split(".")[0]) and importlib.util.find_spec(module):
            lines.append(f"  {what + ':':<24} {command(module, *arguments)}")
    return "\n".join(lines)
