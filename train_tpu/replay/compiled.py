"""An update made again by the compiled step, from the nearest state before it."""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from rich.console import Console

from core.checkpoint.manifest import JAX
from core.compilation_cache import keep_compiled
from core.data.batches import Batch as LoadedBatch
from core.data.batches import Data
from core.errors import UserError
from core.gpu_memory import require_free_memory
from core.model import Params
from core.progress import Activity
from core.run.engine import Device, Metrics
from core.sharding import MeshShape, make_mesh, parse_mesh, require_deterministic_operations
from core.tokenizer import Tokenizer
from train_tpu.backend import choose_kernels
from train_tpu.replay.recorded import Recorded
from train_tpu.setup import Pretraining, Setup, open_source, settle
from train_tpu.trainer import make_engine, new_state, saved_state

SPREAD = {"float32": 2e-5, "bfloat16": 2.5e-3}
"""How far the loss may lie from the log's, relative to it, where sums are made in another order: of a dozen
updates in float32 on 1 and 8 devices, and of 200 in bfloat16 with other micro-batches (docs/KERNELS.md)."""


class Figures(NamedTuple):
    """What the log says of an update, and what is compared."""

    loss: float
    grad_norm: float

    def equals(self, other: "Figures") -> bool:
        """To the bit; one NaN is like another."""
        return all(a == b or (math.isnan(a) and math.isnan(b)) for a, b in zip(self, other, strict=True))


@dataclasses.dataclass(frozen=True)
class Replayed:
    """An update that has been made again."""

    params: Params
    """Before it."""
    batch: LoadedBatch
    lr: float
    metrics: Metrics
    device: Device
    logged: Figures | None
    """None: the log has no line of it."""
    others: list[int]
    """The updates made on the way to it whose loss or gradient norm is not the log's to the bit."""

    @property
    def figures(self) -> Figures:
        """Loss and gradient norm as they are now."""
        return Figures(self.metrics.loss, self.metrics.grad_norm)


def open_setup(recorded: Recorded, dataset: Data, tokenizer: Tokenizer, console: Console) -> Pretraining:
    """The run as these devices train it: with the mesh that made the update where that fits them, else with
    all of them on `data`, or with one where they cannot share its batch."""
    config, folder = recorded.config, recorded.folder
    if config.deterministic:
        require_deterministic_operations()
    require_free_memory()
    keep_compiled()
    with Activity("finding the devices"):
        devices = jax.devices()
    try:
        mesh = make_mesh(parse_mesh(recorded.mesh, len(devices)))
    except UserError:
        mesh = make_mesh(MeshShape(data=len(devices)))
    parts = 1 if config.grad_accum_steps is None else config.grad_accum_steps
    if config.batch // parts % (mesh.shape["data"] * mesh.shape["fsdp"]):
        mesh = make_mesh(MeshShape(), devices[:1])
    kernels = choose_kernels(config.kernels, devices[0])
    config = dataclasses.replace(config, out=folder)
    config, step, _ = settle(config, recorded.model, mesh, kernels, tokenizer)
    record, source = recorded.record, None
    if recorded.source:
        source = open_source(recorded.source, step, record, mesh)
    return Pretraining(
        config=config, out=folder, tokenizer=tokenizer, prompts=[], steps=recorded.steps, mesh=mesh,
        step=step, record=record, source=source, console=console, dataset=dataset,
    )  # fmt: skip


def make_again(recorded: Recorded, setup: Setup) -> Replayed:
    """Makes the updates from the nearest checkpoint up to the recorded one; nothing is written."""
    state = saved_state(setup, recorded.start)[0] if recorded.start else new_state(setup)
    engine = make_engine(setup, state, None, None)
    batches = setup.open_batches(recorded.cursor)
    others: list[int] = []
    try:
        with Activity(
            "making updates again", recorded.step - recorded.first + 1, console=setup.console
        ) as done:
            for step in range(recorded.first, recorded.step):
                batch, settings = next(batches), recorded.settings(step)
                if settings.leaves_out(step):
                    done.advance(text=f"update {step}, left out")
                    continue
                guard = recorded.limits(settings.guard, batch.first)
                metrics = engine.read(engine.dispatch(batch, step, recorded.lr(step), guard))
                logged = figures_in(recorded, step)
                if logged and not logged.equals(Figures(metrics.loss, metrics.grad_norm)):
                    others.append(step)
                done.advance(text=f"update {step}, loss {metrics.loss:.4f}")
            params = jax.tree.map(jnp.copy, engine.state.params)  # the step donates them
            batch, lr = next(batches), recorded.lr(recorded.step)
            guard = recorded.limits(recorded.settings(recorded.step).guard, batch.first)
            metrics = engine.read(engine.dispatch(batch, recorded.step, lr, guard))
            done.advance(text=f"update {recorded.step}, loss {metrics.loss:.4f}")
    finally:
        batches.close()
    logged = figures_in(recorded, recorded.step)
    return Replayed(params, batch, lr, metrics, engine.device, logged, others)


def figures_in(recorded: Recorded, step: int) -> Figures | None:
    """What the log has of an update."""
    line = recorded.lines.get(step)
    if line is None or "grad_norm" not in line:
        return None
    return Figures(float(line["loss"]), float(line["grad_norm"]))


def compare(recorded: Recorded, setup: Setup, replayed: Replayed) -> list[str]:
    """How the update compares with the log's, a line each."""
    now, logged = replayed.figures, replayed.logged
    refused = "" if replayed.metrics.applied else ", not applied: the guard refused it"
    figures = f"loss {now.loss!r}, gradient norm {now.grad_norm!r}, lr {replayed.lr:.3e}"
    lines = [f"update {recorded.step}: {figures}{refused}"]
    if logged is None:
        return [*lines, "the log has no line of it to compare with"]
    if logged.equals(now):
        on_the_way = recorded.step - recorded.first
        also = f", and so are the {on_the_way} before it" if on_the_way and not replayed.others else ""
        lines.append(f"equal to the log to the bit{also}")
        if replayed.others:
            first, more = replayed.others[0], len(replayed.others) - 1
            more = f" and {more} more" if more else ""
            lines.append(f"not equal on the way there: update {first}{more}")
            lines.append(why_not_equal(recorded, setup, replayed, first))
        return lines
    lines.append(f"the log says: loss {logged.loss!r}, gradient norm {logged.grad_norm!r}")
    off = abs(now.loss - logged.loss) / max(abs(logged.loss), 1e-30)
    spread = SPREAD[setup.step.compute.dtype]
    if replayed.others:  # from there on the parameters differ, too
        first = replayed.others[0]
        after = recorded.step - first
        how_far = f"{after} update{'s' * (after > 1)} after the first that differs, {first}"
        how_far += f"; orders of sums make {spread:g} in one"
    else:
        how_far = f"{'within' if off <= spread else 'beyond'} the {spread:g} that orders of sums make"
    if math.isfinite(off):
        lines.append(f"the losses differ by {off:.1e} of the log's, {how_far}")
    first = replayed.others[0] if replayed.others else recorded.step
    lines.append(why_not_equal(recorded, setup, replayed, first))
    return lines


def why_not_equal(recorded: Recorded, setup: Setup, replayed: Replayed, step: int) -> str:
    """The reason for which loss and norm of an update, the first to differ, are not the log's to the bit."""
    here, start, mesh = replayed.device, recorded.start_of(step), str(MeshShape(**setup.mesh.shape))
    made = "the update" if step == recorded.step else f"update {step}"
    if recorded.engine != JAX:
        masks = ", and its dropout draws other masks" if setup.step.model.dropout > 0 else ""
        return f"{recorded.engine} made {made}, and JAX sums in another order{masks}"
    if start and (start.kind, start.n) != tuple(here):
        there = f"{start.n} x {start.kind} made {made}"
        return f"{there}, and here are {here.n} x {here.kind}, which sum in another order"
    if start and start.mesh and start.mesh != mesh:
        return f"--mesh {start.mesh} made {made}, and here is {mesh}, which sums in another order"
    if start and start.processes > 1:  # what they exchange is summed by another library than within one
        return f"{start.processes} processes made {made}, which sum in another order than this one"
    if not (jax.default_backend() == "cpu" or setup.config.deterministic):
        return f"a {here.kind} repeats itself to the bit only with --deterministic, and the run was without"
    return (
        "equality was to be expected: other versions of the code or its libraries, a setting changed on the "
        "way, or another processor can be the cause"
    )
