"""Writing a grown checkpoint, leaf by leaf, and proving what was written.

Only one leaf of the old model is in memory at a time, so that growing takes about the memory of its result.
`stacking.transform` says what a grown leaf is; here it is written, read back and compared with memory.
"""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from core.checkpoint.checkpointer import flatten, nest, read_leaves, save_tree, stored
from core.checkpoint.manifest import Manifest, code_version, differing_leaves, sync_path
from core.checkpoint.manifest import verify as verify_files
from core.checkpoint.steps import run_folder, step_path
from core.compilation_cache import keep_compiled
from core.config import ModelConfig
from core.data.batches import train_batches
from core.errors import UserError
from core.folders import new_folder
from core.keys import Purpose, make_key
from core.leaves import path_names
from core.loss import cross_entropy
from core.model import Compute, Params, abstract_params, forward, head_table, init_params
from core.progress import Activity
from core.run.data import open_recorded_data
from core.run.folder import data_name, recorded_run, write_config
from core.run.log import carry_log
from core.run.settings import flatten as flatten_settings
from core.sharding import make_mesh
from stacking.growth import Growth
from stacking.transform import grow_leaf, parameter_of
from train_tpu.config import RunConfig
from train_tpu.step import StepConfig, abstract_state

PROBE_ROWS = 1  # sequences; 200M parameters take seconds for 1024 tokens on a CPU, and there are two losses
PROBE_CHUNK = 1024  # tokens whose logits are held at once


def rewrite(growth: Growth, say: Callable[[str], None]) -> tuple[int, tuple[float, float]]:
    """Writes the grown run, or parameters, as `growth.out`: it appears complete and verified, or not at all.

    Growing moves bytes, so it runs on the CPU, whatever the machine has.

    Args:
        say: prints a line for the user.

    Returns:
        The number of leaves verified, and the probe's loss before and after, in nats per token.

    Raises:
        UserError: the checkpoint is damaged, or the disk does not give back what was written.
        RuntimeError: the plan preserves the function, and the loss changed.
    """
    jax.config.update("jax_platforms", "cpu")
    keep_compiled()
    with new_folder(growth.out) as folder:
        verify_files(growth.step_dir)
        check_source(growth)
        probe, what = choose_probe(growth)
        say(f"probe: {what}")
        target = step_path(folder / "checkpoints", growth.manifest.step) if growth.runs else folder
        written, grown = write(growth, target, probe)
        verify(target, grown)
        if growth.runs:
            growth.tokenizer.carry(folder)
            finish_run_folder(folder, growth.step_dir, written)
    before, after = written.lineage[-1]["probe"]["loss"]
    return len(grown), (before, after)


def check_source(growth: Growth) -> None:
    """Refuses a checkpoint that does not hold just the leaves that its own configuration says."""
    wanted, saved = stored(growth.manifest, source_leaves(growth)), growth.manifest.tree
    if not growth.runs:
        saved = {path: leaf for path, leaf in saved.items() if path.startswith("params/")}
    differing = differing_leaves(saved, wanted)
    if differing:
        path, (there, here) = next(iter(differing.items()))
        raise UserError(
            f"{growth.step_dir} is not what its configuration says: {path} is {there} in it, and {here} in "
            f"the model and optimizer described ({len(differing)} leaves differ): copy it again"
        )


def choose_probe(growth: Growth) -> tuple[Int[Array, "B S1"], str]:
    """Tokens to compare losses on, and in words what they are: what the run reads next, or random ones
    where its data cannot be opened."""
    model, why = growth.models[0], "parameters alone have no data"
    if growth.runs:
        run, manifest = growth.runs[0], growth.manifest
        try:
            dataset = open_recorded_data(run.data, manifest.data, growth.tokenizer.name, model.context)
        except UserError as error:
            why = f"the run's data cannot be opened ({error})"
        else:
            if dataset.fingerprint == manifest.data["fingerprint"]:
                batches = train_batches(
                    dataset, seed=run.seed, batch=PROBE_ROWS, start=manifest.sequences,
                    vocab_size=growth.tokenizer.vocab_size,
                )  # fmt: skip
                tokens = jnp.asarray(next(batches).tokens, jnp.int32)
                batches.close()
                return tokens, "the next sequence of the run's data"
            why = (
                f"{data_name(run.data)} is no longer what the run was trained on, so a resume will be refused"
            )
    random = np.random.default_rng(0).integers(0, model.vocab_size, (PROBE_ROWS, model.context + 1))
    return jnp.asarray(random, jnp.int32), f"random tokens, since {why}"


def write(growth: Growth, target: Path, probe: Int[Array, "B S1"]) -> tuple[Manifest, dict[str, Array]]:
    """Writes the grown state as the step folder `target`.

    Returns:
        The manifest written, but for its lists of leaves and files; and the grown leaves by path.

    Raises:
        RuntimeError: the plan preserves the function, and the loss changed.
    """
    model, grown_model = growth.models
    source = nest(read_leaves(growth.step_dir, abstract_leaves(model, None)))
    before = float(probe_loss(model, source.pop("params"), probe))  # not kept: two models would be in memory
    drawn = draw(growth)
    grown = {}
    leaves = source_leaves(growth)
    with Activity("growing", len(leaves), "leaves") as progress:
        for path, spec in leaves.items():
            names = tuple(path.split("/"))
            leaf = grow_leaf(
                names, read_leaves(growth.step_dir, {path: spec})[path], growth.plan,
                reset_optimizer=growth.reset_optimizer, fresh=drawn.get(parameter_of(names)),
            )  # fmt: skip
            grown[path] = jax.block_until_ready(leaf)
            progress.advance()
    tree = nest(grown)
    after = float(probe_loss(grown_model, tree["params"], probe))
    if growth.plan.preserves and after != before:
        raise RuntimeError(f"identity growth changed the loss: {before} to {after}")
    config: dict[str, Any] = {"model": dataclasses.asdict(grown_model)}
    if growth.runs:
        config["run"] = flatten_settings(growth.runs[1])
    entry = growth.lineage_record() | {"probe": {"tokens": probe[:, 1:].size, "loss": [before, after]}}
    manifest = dataclasses.replace(
        growth.manifest, kind="train" if growth.runs else "params", config=config,
        lineage=[*growth.manifest.lineage, entry], code=code_version(), tree={}, files={},
    )  # fmt: skip
    save_tree(target, tree, manifest, None if growth.runs else growth.tokenizer)
    return manifest, grown


def verify(target: Path, grown: dict[str, Array]) -> None:
    """Compares every leaf in the step folder `target` with `grown`, which was written there, bit by bit.

    Raises:
        UserError: the disk does not give back what was written.
    """
    verify_files(target)
    with Activity("comparing", len(grown), "leaves") as progress:
        for path, leaf in grown.items():
            there = read_leaves(target, {path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)})[path]
            if np.asarray(there).tobytes() != np.asarray(leaf).tobytes():
                raise UserError(
                    f"{path} in {target} is not what was written there, so the disk or memory is failing: "
                    "grow again onto another disk"
                )
            progress.advance()


def finish_run_folder(folder: Path, step_dir: Path, grown: Manifest) -> None:
    """What makes a checkpoint a run: config.json, and the history of the run that was grown."""
    write_config(folder, recorded_run(grown))
    carry_log(run_folder(step_dir), folder, grown.step)
    for path in (folder / "checkpoints", folder):
        sync_path(path)


@functools.partial(jax.jit, static_argnums=0)
def probe_loss(model: ModelConfig, params: Params, tokens: Int[Array, "B S1"]) -> Float[Array, ""]:
    """Cross-entropy in nats per token, float32. Layers run as a loop, so that each is the same code however
    many there are: what must be equal to the bit then is."""
    hidden = forward(model, params, tokens[:, :-1], Compute())
    sums = cross_entropy(hidden, head_table(model, params), tokens[:, 1:], chunk=PROBE_CHUNK)
    return sums.nll / tokens[:, 1:].size


def source_leaves(growth: Growth) -> dict[str, jax.ShapeDtypeStruct]:
    """The leaves that the checkpoint must hold, by path."""
    return abstract_leaves(growth.models[0], growth.runs[0] if growth.runs else None)


def abstract_leaves(model: ModelConfig, run: RunConfig | None) -> dict[str, jax.ShapeDtypeStruct]:
    """The leaves by path of a run's training state, or without a run of parameters alone."""
    if run is None:
        return flatten({"params": abstract_params(model)})[0]
    # How a step is run changes no shape of its state.
    step_config = StepConfig(model, run.optim, run.guard, Compute(), run.z_loss, loss_chunk=1)
    return flatten(abstract_state(step_config, make_mesh(devices=jax.devices()[:1])))[0]


def draw(growth: Growth) -> dict[tuple[str, ...], Array]:
    """New parameters of the grown model by path, where the plan has fresh layers."""
    if "fresh" not in growth.plan.how:
        return {}
    seed = growth.runs[0].seed if growth.runs else 0
    params = init_params(growth.models[1], make_key(seed, Purpose.GROW, growth.manifest.step))
    return {path_names(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
