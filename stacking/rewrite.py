"""Growing a checkpoint on the disk, leaf by leaf, and proving what was written.

Only one leaf of the old model is in memory at a time, so that growing takes about the memory of its result.
The proof has two halves: what the disk holds is what was in memory, and that is what a second statement of
the rules of `transform`, layer by layer in NumPy, makes of the source.
"""

import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from core.checkpoint import Manifest, differing_leaves, flatten, nest, read_leaves, save_tree
from core.checkpoint import verify as verify_files
from core.config import ModelConfig
from core.errors import UserError
from core.folders import CACHE
from core.keys import Purpose, make_key
from core.loss import cross_entropy
from core.manifest import code_version
from core.model import Compute, Params, abstract_params, forward, head_table, init_params
from core.sharding import make_mesh
from core.tokenizer import Tokenizer
from stacking.plan import Plan
from stacking.transform import RESIDUAL, grow_leaf, parameter_of, role_of
from train_tpu import config as settings
from train_tpu.config import RunConfig
from train_tpu.data import train_batches
from train_tpu.optimizer import path_names
from train_tpu.prepare import open_or_prepare
from train_tpu.step import StepConfig, abstract_state

PROBE_ROWS = 1  # sequences; 200M parameters take seconds for 1024 tokens on a CPU, and there are two losses
PROBE_CHUNK = 1024  # tokens whose logits are held at once


@functools.partial(jax.jit, static_argnums=0)
def probe_loss(model: ModelConfig, params: Params, tokens: Int[Array, "B S1"]) -> Float[Array, ""]:
    """Cross-entropy in nats a token, float32. Layers run as a loop, so that each is the same code however
    many there are: what must be equal to the bit then is."""
    hidden = forward(model, params, tokens[:, :-1], Compute())
    sums = cross_entropy(hidden, head_table(model, params), tokens[:, 1:], chunk=PROBE_CHUNK)
    return sums.nll / tokens[:, 1:].size


def abstract_leaves(model: ModelConfig, run: RunConfig | None) -> dict[str, jax.ShapeDtypeStruct]:
    """The leaves by path of a run's training state, or without a run of parameters alone."""
    if run is None:
        return flatten({"params": abstract_params(model)})[0]
    # How a step is run changes no shape of its state.
    step_config = StepConfig(model, run.optim, run.guard, Compute(), run.z_loss, loss_chunk=1)
    return flatten(abstract_state(step_config, make_mesh(devices=jax.devices()[:1])))[0]


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
    """The settings before and after; None for parameters alone."""
    reset_optimizer: bool
    tokenizer: Tokenizer

    def check_source(self) -> None:
        """Refuses a checkpoint that does not hold just the leaves that its own configuration says."""
        wanted = abstract_leaves(self.models[0], self.runs[0] if self.runs else None)
        differing = differing_leaves(self.manifest.tree, wanted)
        if not differing:
            return
        path, (there, here) = next(iter(differing.items()))
        if path.startswith("params/head/"):
            kind = "tied to the embedding" if self.models[0].tied else "a matrix of its own"
            raise UserError(
                f"{self.step_dir} says that its head is {kind}, but its {path} is {there}: grow a checkpoint "
                "whose configuration fits"
            )
        raise UserError(
            f"{self.step_dir} is not what its configuration says: {path} is {there} in it, and {here} in "
            f"the model and optimizer described ({len(differing)} leaves differ): copy it again"
        )

    def probe(self) -> tuple[Int[Array, "B S1"], str]:
        """Tokens to compare losses on, and in words what they are: what the run reads next, or random
        ones where its data is not at hand."""
        model, why = self.models[0], "parameters alone have no data"
        if self.runs:
            run, data = self.runs[0], self.manifest.data
            if data is None:
                raise AssertionError(f"{self.step_dir} is a run's checkpoint without data")
            try:
                dataset = open_or_prepare(run.data, self.tokenizer.name, model.context, CACHE)
            except UserError as error:
                why = f"the run's data is not at hand ({error})"
            else:
                if dataset.fingerprint == data["fingerprint"]:
                    batches = train_batches(
                        dataset, seed=run.seed, batch=PROBE_ROWS, start=self.manifest.sequences,
                        vocab_size=model.vocab_size,
                    )  # fmt: skip
                    tokens = jnp.asarray(next(batches).tokens, jnp.int32)
                    batches.close()
                    return tokens, "the next sequence of the run's data"
                why = f"{run.data} is no longer what the run was trained on, so going on will be refused"
        random = np.random.default_rng(0).integers(0, model.vocab_size, (PROBE_ROWS, model.context + 1))
        return jnp.asarray(random, jnp.int32), f"random tokens, since {why}"

    def write(
        self, target: Path, record: dict[str, Any], probe: Int[Array, "B S1"]
    ) -> tuple[Manifest, dict[str, Array]]:
        """Writes the grown state as the step folder `target`.

        Args:
            record: the lineage record; what the probe's loss was before and after is added to it.

        Returns:
            The manifest written, but for its lists of leaves and files; and the grown leaves by path.

        Raises:
            AssertionError: the plan preserves the function, and the loss is another.
        """
        before = float(probe_loss(self.models[0], self._read_params(self.step_dir, self.models[0]), probe))
        drawn = self._draw()
        grown = {}
        for path, source in self._source_leaves():
            names = tuple(path.split("/"))
            leaf = grow_leaf(
                names, source, self.plan,
                reset_optimizer=self.reset_optimizer, fresh=drawn.get(parameter_of(names)),
            )  # fmt: skip
            grown[path] = jax.block_until_ready(leaf)
        tree = nest(grown)
        after = float(probe_loss(self.models[1], tree["params"], probe))
        if self.plan.preserves and after != before:
            raise AssertionError(f"identity growth changed the loss: {before} to {after}")
        config: dict[str, Any] = {"model": dataclasses.asdict(self.models[1])}
        if self.runs:
            config["run"] = settings.flatten(self.runs[1])
        entry = record | {"probe": {"tokens": probe[:, 1:].size, "loss": [before, after]}}
        manifest = dataclasses.replace(
            self.manifest, config=config, lineage=[*self.manifest.lineage, entry], code=code_version(),
            tree={}, files={},
        )  # fmt: skip
        save_tree(target, tree, manifest, None if self.runs else self.tokenizer)
        return manifest, grown

    def verify(self, target: Path, grown: dict[str, Array]) -> int:
        """Compares every leaf in `target` with `grown`, which was written, and that with its source, by bits.

        Returns:
            The number of leaves compared.

        Raises:
            UserError: the disk does not give back what was written.
            AssertionError: a leaf is not what the plan makes of its source.
        """
        verify_files(target)
        drawn = self._draw()
        for path, old in self._source_leaves():
            new = np.asarray(grown[path])
            there = read_leaves(target, {path: jax.ShapeDtypeStruct(new.shape, new.dtype)})[path]
            if np.asarray(there).tobytes() != new.tobytes():
                raise UserError(
                    f"{path} in {target} is not what was written there, so the disk or memory is failing: "
                    "grow again onto another disk"
                )
            self._check_leaf(tuple(path.split("/")), np.asarray(old), new, drawn)
        return len(grown)

    def _check_leaf(
        self, names: tuple[str, ...], old: np.ndarray, new: np.ndarray, drawn: dict[tuple[str, ...], Array]
    ) -> None:
        """The rules of `transform` once more, without it; AssertionError where `new` does not follow them."""
        n_layers = self.plan.n_layers
        if new.dtype != old.dtype or new.shape != (
            (n_layers, *old.shape[1:]) if "layers" in names else old.shape
        ):
            raise AssertionError(
                f"{'/'.join(names)} is {new.dtype}{list(new.shape)}, not as its source's layers"
            )
        if "layers" not in names:
            pairs = [("", new, np.zeros_like(old) if self._starts_anew(names) else old)]
        else:
            pairs = [
                (f"[{layer}]", new[layer], self._expected_layer(names, layer, old, drawn))
                for layer in range(n_layers)
            ]
        for where, found, expected in pairs:
            if found.tobytes() != expected.tobytes():
                raise AssertionError(f"{'/'.join(names)}{where} is not its source's")

    def _expected_layer(
        self, names: tuple[str, ...], layer: int, old: np.ndarray, drawn: dict[tuple[str, ...], Array]
    ) -> np.ndarray:
        """What one layer of a grown leaf must hold."""
        role, how, source = role_of(names), self.plan.how[layer], old[self.plan.sources[layer]]
        zeroed = how == "identity" and names[-2] in RESIDUAL
        if role == "params":
            if how == "fresh":
                return np.asarray(drawn[parameter_of(names)][layer])
            return np.zeros_like(source) if zeroed else source
        forgotten = self.reset_optimizer or (role == "mu" and (zeroed or how == "fresh"))
        return np.zeros_like(source) if forgotten else source

    def _starts_anew(self, names: tuple[str, ...]) -> bool:
        """Whether a leaf outside the layers is set to zero."""
        if names[0] == "guard":
            return not self.plan.is_noop and names[-1] != "skipped"
        return self.reset_optimizer and names[0] == "opt_state" and names[-1] != "ns_coeffs"

    def _source_leaves(self) -> Iterator[tuple[str, Array]]:
        """The leaves that are grown, one at a time."""
        for path, spec in abstract_leaves(self.models[0], self.runs[0] if self.runs else None).items():
            yield path, read_leaves(self.step_dir, {path: spec})[path]

    def _read_params(self, step_dir: Path, model: ModelConfig) -> Params:
        return nest(read_leaves(step_dir, abstract_leaves(model, None)))["params"]

    def _draw(self) -> dict[tuple[str, ...], Array]:
        """New parameters by path, where the plan needs any; the same ones whenever they are asked for."""
        if "fresh" not in self.plan.how:
            return {}
        seed = self.runs[0].seed if self.runs else 0
        params = init_params(self.models[1], make_key(seed, Purpose.GROW, self.manifest.step))
        return {path_names(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
