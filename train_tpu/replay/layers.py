"""A batch gone through layer by layer, outside the compiled step: what is large, and what went wrong first.

The layers are those of core/model.py, called one by one with the parameters from before the update; products
and sums are XLA's on one device, whatever the run had, so loss and gradients are the step's up to rounding.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from core.config import ModelConfig
from core.data.batches import Batch as LoadedBatch
from core.documents import number_documents
from core.keys import Purpose, make_key
from core.leaves import path_names
from core.loss import IGNORE, cross_entropy
from core.model import (
    QKV,
    Block,
    Compute,
    Params,
    abstract_params,
    definition,
    forward_context,
    head_table,
    scoped,
)
from core.ops import rms_norm
from core.progress import Activity
from core.run.watching import Sizes
from train_tpu.engine import own_copy
from train_tpu.replay.compiled import Replayed
from train_tpu.replay.operations import first_lost
from train_tpu.setup import Setup
from train_tpu.step import StepConfig
from train_tpu.watch import measure

TOKENS = 8192  # that go through a layer at once


@dataclasses.dataclass
class Layer:
    """What went through a layer."""

    name: str
    activation: Sizes = dataclasses.field(default_factory=Sizes)
    """The residual stream after it."""
    gradient: Sizes = dataclasses.field(default_factory=Sizes)
    """Of the loss with respect to that."""
    weights: float = 0.0
    """Norm of the gradient of its parameters."""


@dataclasses.dataclass(frozen=True)
class Wrong:
    """The first value that is not finite."""

    where: str
    """Its module, as the checkpoint names it, such as "layers/7/attn/q"."""
    operation: str
    """As JAX calls it."""
    backward: bool
    made: bool
    """Whether the operation made it of finite values."""


@dataclasses.dataclass(frozen=True)
class Passage:
    """A batch that has gone through the layers."""

    layers: list[Layer]
    losses: np.ndarray
    """[rows]: nats per token; 0 for a row that predicts nothing."""
    loss: float
    grad_norm: float
    bad_parameters: list[tuple[str, int, int]]
    """Those that hold values that are not finite: their name, how many, and of how many."""
    wrong: Wrong | None


class OfRows(NamedTuple):
    """What the layers are given of some sequences next to their activations."""

    dropout_keys: jax.Array | None
    """One for each, as the step has them; None without dropout."""
    documents: jax.Array | None
    """See `core.model.forward`."""


class Stage:
    """A function that is compiled once. A call gives what it gives, and whether all of that is finite."""

    def __init__(self, function: Callable[..., Any]):
        self.function = function
        self._compiled = jax.jit(self._checked)

    def __call__(self, *arguments: Any) -> tuple[Any, bool]:
        result, finite = self._compiled(*arguments)
        return result, bool(finite)

    def _checked(self, *arguments: Any) -> tuple[Any, jax.Array]:
        result = self.function(*arguments)
        return result, jnp.array([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(result)]).all()


class Pass:
    """The stages of a forward and a backward pass, each compiled once."""

    def __init__(self, config: ModelConfig, compute: Compute, z_loss: float, chunk: int):
        self.config, self.compute, self._z_loss, self._chunk = config, compute, z_loss, chunk
        one = nnx.eval_shape(lambda: Block(self.config, nnx.Rngs(params=jax.random.key(0))))
        self._block = nnx.split(one)[0]
        self._no_layers = abstract_params(self.config)["layers"]
        self.embed = Stage(self._embed)
        self.layer = Stage(self._layer)
        self.loss = Stage(jax.value_and_grad(self._loss, argnums=(0, 1), has_aux=True))
        self.layer_back = Stage(self._layer_back)
        self.embed_back = Stage(self._embed_back)
        self.measure, self.squares = jax.jit(measure), jax.jit(squares)

    def _context(self, length: int, rows: OfRows) -> Any:
        return forward_context(self.config, self.compute, jnp.arange(length)[None], *rows)

    def _embed(self, ends: Params, tokens: jax.Array, rows: OfRows) -> jax.Array:
        model = nnx.merge(definition(self.config), ends | {"layers": self._no_layers})
        return scoped("embed", model.embed_tokens, tokens, self._context(tokens.shape[1], rows))

    def _layer(self, block: Params, x: jax.Array, number: jax.Array, rows: OfRows) -> jax.Array:
        ctx = self._context(x.shape[1], rows).of_layer(number, None)
        x, branch, _ = nnx.merge(self._block, block)(x, None, ctx)
        return x + branch

    def _loss(self, ends: Params, x: jax.Array, targets: jax.Array, n: jax.Array) -> tuple[Any, Any]:
        hidden = scoped("norm", rms_norm, x, ends["norm"]["scale"], self.config.norm_eps)
        table = head_table(self.config, ends)
        sums = functools.partial(cross_entropy, z_loss=self._z_loss, chunk=self._chunk)
        rows = jax.lax.map(lambda row: sums(row[0][None], table, row[1][None]).nll, (hidden, targets))
        return sums(hidden, table, targets).total / n, jax.lax.stop_gradient(rows) / x.shape[1]

    def _layer_back(
        self, block: Params, x: jax.Array, number: jax.Array, rows: OfRows, gradient: jax.Array
    ) -> tuple[Params, jax.Array]:
        return jax.vjp(lambda block, x: self._layer(block, x, number, rows), block, x)[1](gradient)

    def _embed_back(self, ends: Params, tokens: jax.Array, rows: OfRows, gradient: jax.Array) -> Params:
        return jax.vjp(lambda ends: self._embed(ends, tokens, rows), ends)[1](gradient)[0]

    def part_of_qkv(self, block: Params, x: jax.Array) -> str:
        """Which of queries, keys and values is not finite first, of those that one product makes."""
        block = nnx.merge(self._block, block)
        normed = block.attn_norm(x)
        parts = {name: getattr(block.attn, name)(normed) for name in "qkv"}
        return next((name for name, y in parts.items() if not bool(jnp.isfinite(y).all())), QKV)


class Search:
    """Looks for the first operation that went wrong, over all parts of a batch."""

    def __init__(self, stages: Pass):
        self._stages = stages
        self._place: float = math.inf
        self.wrong: Wrong | None = None

    def run(self, place: int, prefix: str, stage: Stage, *arguments: Any) -> Any:
        """What a stage gives. `place`: its place in the order; prefix: what its modules' names begin with."""
        result, finite = stage(*arguments)
        if not finite and place < self._place:
            self._place = place
            self.wrong = self._look(prefix, stage, *arguments)
        return result

    def _look(self, prefix: str, stage: Stage, *arguments: Any) -> Wrong:
        found = first_lost(stage.function, *arguments)
        if found is None:
            return Wrong(prefix, "an operation that is not known", False, True)
        scope = found.scope
        if scope.endswith(QKV) and not found.backward:
            scope = scope.removesuffix(QKV) + self._stages.part_of_qkv(*arguments[:2])
        where = "/".join(part for part in (prefix, scope) if part)
        return Wrong(where, found.name, found.backward, found.made)


_make_pass = functools.lru_cache(maxsize=2)(Pass)


def stages_for(step: StepConfig) -> Pass:
    """The stages of a model, in XLA's plain operations on one device."""
    compute = dataclasses.replace(
        step.compute, mesh=None, kernels=None, remat="none", attention="xla", unroll=1
    )
    return _make_pass(step.model, compute, step.z_loss, step.loss_chunk)


def dropout_keys(setup: Setup, index: np.ndarray) -> jax.Array | None:
    """Those of `OfRows`; index: of the sequences, in the run's order."""
    if setup.step.model.dropout == 0:
        return None
    make = functools.partial(make_key, jnp.uint32(setup.config.seed), Purpose.DROPOUT)
    return jax.vmap(make)(jnp.asarray(index, jnp.uint32))


def targets_of(batch: LoadedBatch) -> np.ndarray:
    """What is predicted, [B, S] int32; nothing in damaged records."""
    return np.where(batch.bad[:, None], IGNORE, batch.tokens[:, 1:].astype(np.int32))


def go_through(setup: Setup, replayed: Replayed) -> Passage:
    """Takes the batch of an update through the layers, forward and back."""
    params = own_copy(replayed.params, setup.mesh)
    stages, batch, n_layers = stages_for(setup.step), replayed.batch, setup.step.model.n_layers
    search = Search(stages)
    ends = {name: part for name, part in params.items() if name != "layers"}
    blocks = [jax.tree.map(lambda leaf, i=i: leaf[i], params["layers"]) for i in range(n_layers)]
    rows, length = batch.tokens.shape[0], batch.tokens.shape[1] - 1
    at_once = max(n for n in range(1, rows + 1) if rows % n == 0 and (n == 1 or n * length <= TOKENS))
    targets = targets_of(batch)
    n_targets = np.float32((~batch.bad).sum() * length)
    layers = [Layer("embed"), *(Layer(f"layers/{i}") for i in range(n_layers))]
    gradients: list[Any] = [None] * (n_layers + 1)  # of the ends, then of every layer
    losses, loss = np.zeros(rows), 0.0

    def add(at: int, gradient: Any) -> None:
        old = gradients[at]
        gradients[at] = gradient if old is None else jax.tree.map(jnp.add, old, gradient)

    with Activity("going through the layers", rows // at_once * (n_layers + 1)) as done:
        for start in range(0, rows, at_once):
            part = slice(start, start + at_once)
            tokens = jnp.asarray(batch.tokens[part, :-1], jnp.int32)
            of_rows = OfRows(
                dropout_keys(setup, batch.first + np.arange(start, start + at_once)),
                number_documents(tokens, setup.step.documents),
            )
            stream = [search.run(0, "", stages.embed, ends, tokens, of_rows)]
            for i in range(n_layers):
                given = (blocks[i], stream[-1], jnp.int32(i), of_rows)
                stream.append(search.run(i + 1, layers[i + 1].name, stages.layer, *given))
            given = (ends, stream[-1], jnp.asarray(targets[part]), n_targets)
            (part_loss, row_losses), (d_ends, g) = search.run(n_layers + 1, "", stages.loss, *given)
            loss += float(part_loss)
            losses[part] = np.asarray(row_losses)
            add(0, d_ends)
            for i in reversed(range(n_layers + 1)):
                for sizes, values in ((layers[i].activation, stream[i]), (layers[i].gradient, g)):
                    sizes.add(np.asarray(stages.measure(values)), values.size)
                place = 2 * n_layers + 2 - i
                if i:
                    given = (blocks[i - 1], stream[i - 1], jnp.int32(i - 1), of_rows, g)
                    d_block, g = search.run(place, layers[i].name, stages.layer_back, *given)
                    add(i, d_block)
                else:
                    add(0, search.run(place, "", stages.embed_back, ends, tokens, of_rows, g))
                done.advance()
    of_weights = [stages.squares(gradient) for gradient in gradients]
    embedded = {name: part for name, part in gradients[0].items() if name in ("embed", "positions")}
    for layer, found in zip(layers, [stages.squares(embedded), *of_weights[1:]], strict=True):
        layer.weights = float(found) ** 0.5
    return Passage(layers, losses, loss, float(sum(of_weights)) ** 0.5, bad_parameters(params), search.wrong)


def squares(tree: Any) -> jax.Array:
    """The sum of the squares of all leaves."""
    return sum((jnp.square(leaf.astype(jnp.float32)).sum() for leaf in jax.tree.leaves(tree)), jnp.float32(0))


def bad_parameters(params: Params) -> list[tuple[str, int, int]]:
    """The parameters with values that are not finite, layer by layer: name, how many, and of how many."""

    def count(path: Any, leaf: jax.Array) -> jax.Array:
        of_layers = leaf if path_names(path)[0] == "layers" else leaf[None]
        return (~jnp.isfinite(of_layers)).sum(axis=tuple(range(1, of_layers.ndim)))

    found = []
    all_counts = jax.jit(lambda tree: jax.tree_util.tree_map_with_path(count, tree))(params)
    for (path, leaf), counts in zip(
        jax.tree_util.tree_leaves_with_path(params), map(np.asarray, jax.tree.leaves(all_counts)), strict=True
    ):
        names = path_names(path)
        in_layers = names[0] == "layers"
        for number in np.flatnonzero(counts):
            full = ("layers", str(number), *names[1:]) if in_layers else names
            found.append(("/".join(full), int(counts[number]), leaf.size // len(counts)))
    return found
