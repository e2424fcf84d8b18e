"""The training step: one pure, donated, compiled function of state, batch and controls.

Loss, gradients, guard, update and metrics are one graph. Whatever may change while a run is on (the
learning rate, the guard's limits) is an input or state, never a constant, so the graph is compiled
once; it is compiled ahead of time, so that a second compilation is an error and not a silent wait.

Shapes: A micro-batches, B rows of one, S positions, W the guard's window.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int, Integer

from core.config import ModelConfig
from core.documents import DocumentMark, number_documents
from core.keys import Purpose, make_key
from core.lora import LoraConfig
from core.loss import IGNORE, cross_entropy
from core.model import Compute, Params, abstract_params, forward, head_table, init_params
from core.ops import Kernels
from core.run.guard import GuardConfig, can_judge, norm_sigma, spike_limit
from core.run.schedule import OptimizerConfig
from core.sharding import (
    BATCH_AXES,
    batch_sharding,
    constrain_parameters,
    is_parallel,
    replicated,
    splits_weights,
    state_shardings,
)
from core.tokenizer import id_dtype
from train_tpu.lora import adapters_for, init_adapters
from train_tpu.optimizer import apply_gradients, make_optimizer
from train_tpu.watch import Seen, leaf_squares, look


class Guard(NamedTuple):
    """What the guard remembers, part of the checkpoint."""

    losses: Float[Array, " W"]
    norms: Float[Array, " W"]
    accepted: Int[Array, ""]
    """Updates applied so far; the next goes to this index modulo W."""
    streak: Int[Array, ""]
    """Updates skipped since the last applied one."""
    skipped: Int[Array, ""]


class TrainState(NamedTuple):
    """Everything a step changes."""

    params: Params
    opt_state: optax.OptState
    guard: Guard


class Batch(NamedTuple):
    """Input of a step. `tokens` holds one more position than the model sees: inputs and targets overlap."""

    tokens: Integer[Array, "A B S1"]
    """With `targets`, [A, B, S]: what the model sees."""
    ignored: Bool[Array, "A B"]
    """Rows that do not count (a damaged record)."""
    index: Integer[Array, "A B"]
    """Each row's number in the stream of training sequences; dropout masks are drawn from it."""
    targets: Int[Array, "A B S"] | None = None
    """The id to predict at each place, -1 where nothing is; None: the next one everywhere."""
    documents: Int[Array, "A B S"] | None = None
    """Of `core.model.forward`, for rows that were packed; None: `StepConfig.documents` says what they are."""


class Controls(NamedTuple):
    """What may differ from step to step without a new compilation."""

    lr: Float[Array, ""]
    sigma: Float[Array, ""]
    halt_after: Int[Array, ""]
    seed: Integer[Array, ""]
    watch: Bool[Array, ""] | None = None
    """Whether this update is watched; None in a step that watches none."""


class Metrics(NamedTuple):
    """What a step reports."""

    loss: Float[Array, ""]
    """The loss that was minimised, per target token (with z-loss)."""
    nll: Float[Array, ""]
    """Cross-entropy in nats per token."""
    grad_norm: Float[Array, ""]
    """Global norm before clipping."""
    applied: Bool[Array, ""]
    streak: Int[Array, ""]
    skipped: Int[Array, ""]
    leaf_norms: dict[str, Float[Array, "..."]]
    """Gradient norm of every leaf, of every layer where it has layers: who is to blame for a spike."""
    seen: Seen | None = None
    """Of a watched update; zeros at others, None in a step that watches none."""


@dataclasses.dataclass(frozen=True)
class StepConfig:
    """All that is compiled into the step."""

    model: ModelConfig
    optim: OptimizerConfig
    guard: GuardConfig
    compute: Compute
    z_loss: float
    loss_chunk: int
    compiler_options: tuple[tuple[str, bool], ...] = ()
    """For XLA, by name."""
    watches: bool = False
    """Whether updates can be watched (train_tpu/watch.py)."""
    documents: DocumentMark | None = None
    """Where attention and positions end; None: they run through the documents of a window."""
    packed: bool = False
    """Whether batches are of packed rows, with their targets and documents."""
    lora: LoraConfig | None = None
    """Of a step that trains adapters: `TrainState.params` are these, and the model's parameters stay."""


def init_state(config: StepConfig, params: Params) -> TrainState:
    """A state at the start of training: the given parameters, empty moments and window."""
    window = jnp.zeros(config.guard.window, jnp.float32)
    zero = jnp.zeros((), jnp.int32)
    guard = Guard(window, jnp.copy(window), zero, jnp.copy(zero), jnp.copy(zero))
    return TrainState(params, make_optimizer(config.optim).init(params), guard)


def emptied(guard: Guard) -> Guard:
    """The guard with nothing in its window, for a run whose losses will have another level or noise."""
    return guard._replace(
        losses=jnp.zeros_like(guard.losses),
        norms=jnp.zeros_like(guard.norms),
        accepted=jnp.zeros_like(guard.accepted),
    )


def abstract_state(config: StepConfig, mesh: Mesh) -> TrainState:
    """Shapes, types and shardings of the state, without its arrays: what restoring needs."""
    return _placed(jax.eval_shape(functools.partial(init_state, config), abstract_trained(config)), mesh)


def abstract_model(config: StepConfig, mesh: Mesh) -> Params:
    """The same of the model's parameters, whether they are trained or not."""
    return _placed(abstract_params(config.model), mesh)


def _placed(tree: Any, mesh: Mesh) -> Any:
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        tree,
        state_shardings(mesh, tree),
    )


def abstract_trained(config: StepConfig) -> Params:
    """Shapes and types of what is trained: the model's parameters, or adapters."""
    if config.lora is None:
        return abstract_params(config.model)
    return jax.eval_shape(lambda: init_adapters(config.lora, config.model, 0))


def fresh_state(config: StepConfig, mesh: Mesh, seed: int) -> TrainState:
    """A new state from a seed, made where it will lie."""

    def make(seed: Array) -> TrainState:
        if config.lora is not None:
            return init_state(config, init_adapters(config.lora, config.model, seed))
        return init_state(config, init_params(config.model, make_key(seed, Purpose.INIT)))

    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(config, mesh))
    return jax.jit(make, out_shardings=shardings)(np.uint32(seed))


def train_step(
    config: StepConfig, state: TrainState, batch: Batch, controls: Controls, *frozen: Params
) -> tuple[TrainState, Metrics]:
    """One update, or none if the guard objects. Pure; `compile_step` makes it run.

    frozen: the model's parameters, where adapters are trained.
    """
    n_targets = count_targets(batch)
    mesh = config.compute.mesh
    if is_parallel(mesh) and not splits_weights(mesh):
        # Each device sums the gradients of its own rows, and the devices' sums are added once, in float32.
        # Left to XLA they are added after every micro-batch, those of the layers in bfloat16, and those of a
        # tied table twice.
        own = dataclasses.replace(config, compute=dataclasses.replace(config.compute, mesh=None))
        rows = P(None, BATCH_AXES)
        loss, nll, gradients = jax.shard_map(
            lambda *inputs: jax.lax.psum(_gradients(own, *inputs), BATCH_AXES),
            mesh=mesh,
            in_specs=(P(), rows, P(), P(), *(P() for _ in frozen)),
            out_specs=P(),
            check_vma=False,
        )(state.params, batch, n_targets, controls.seed, *frozen)
    else:
        loss, nll, gradients = _gradients(config, state.params, batch, n_targets, controls.seed, *frozen)

    squares = leaf_squares(gradients)
    norm = jnp.sqrt(sum(jnp.sum(s) for s in squares.values()))
    leaf_norms = {name: jnp.sqrt(s) for name, s in squares.items()}
    ok = _acceptable(state.guard, loss, norm, controls)

    def update(ok: Array, kernels: Kernels | None) -> tuple[Params, optax.OptState]:
        return apply_gradients(
            config.optim, gradients, norm, state.params, state.opt_state, controls.lr, ok,
            config.compute.dtype, mesh, kernels,
        )  # fmt: skip

    def look_at() -> Seen:
        tokens = batch.tokens[0, :, :-1].astype(jnp.int32)
        documents = number_documents(tokens, config.documents)
        return look(config.model, config.compute, state.params, update(ok, None)[0], tokens, documents)

    seen = None
    if config.watches:
        seen = jax.lax.cond(controls.watch, look_at, functools.partial(_zeros, look_at))
        # Always true. The update then waits for the look at what it changes, which need not be copied.
        ok &= seen.hidden[2] >= 0
    kept = update(ok, config.compute.kernels)
    guard = _remember(state.guard, loss, norm, ok)
    metrics = Metrics(loss, nll, norm, ok, guard.streak, guard.skipped, leaf_norms, seen)
    return TrainState(*kept, guard), metrics


def _zeros(function: Callable[[], Any]) -> Any:
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(function))


def count_targets(batch: Batch) -> Float[Array, ""]:
    """How many tokens a batch predicts."""
    if batch.targets is None:
        return jnp.sum(~batch.ignored).astype(jnp.float32) * (batch.tokens.shape[-1] - 1)
    counted = (batch.targets != IGNORE) & ~batch.ignored[..., None]
    return jnp.maximum(jnp.sum(counted), 1).astype(jnp.float32)


def _gradients(
    config: StepConfig, params: Params, batch: Batch, n_targets: Array, seed: Array, *frozen: Params
) -> tuple[Array, Array, Params]:
    """Loss and cross-entropy per target token, and the gradients, summed over the micro-batches in turn."""

    def micro_loss(params: Params, micro: Batch) -> tuple[Array, Array]:
        if config.packed:
            inputs, targets = micro.tokens.astype(jnp.int32), micro.targets
        else:
            inputs, targets = micro.tokens[:, :-1].astype(jnp.int32), micro.tokens[:, 1:].astype(jnp.int32)
        targets = jnp.where(micro.ignored[:, None], IGNORE, targets)
        adapters = None
        if config.lora is not None:
            adapters = adapters_for(config.lora, config.model, params, seed, micro.index)
            (params,) = frozen
        keys = None
        if config.model.dropout > 0:
            keys = jax.vmap(functools.partial(make_key, seed, Purpose.DROPOUT))(micro.index)
        documents = micro.documents if config.packed else number_documents(inputs, config.documents)
        hidden = forward(config.model, params, inputs, config.compute, keys, documents, adapters)
        sums = cross_entropy(
            hidden,
            head_table(config.model, params),
            targets,
            z_loss=config.z_loss,
            chunk=config.loss_chunk,
            mesh=config.compute.mesh,
            kernels=config.compute.kernels,
        )
        # Every micro-batch is divided by the whole batch's count: their sum is the big batch's mean.
        return sums.total / n_targets, sums.nll / n_targets

    def micro_gradients(micro: Batch) -> tuple[Array, Array, Params]:
        (loss, nll), gradients = jax.value_and_grad(micro_loss, has_aux=True)(params, micro)
        return loss, nll, constrain_parameters(gradients, config.compute.mesh)

    def add_micro(carry, micro):
        return jax.tree.map(jnp.add, carry, micro_gradients(micro)), None

    if batch.tokens.shape[0] == 1:
        return micro_gradients(jax.tree.map(lambda x: x[0], batch))
    zero = jnp.zeros((), jnp.float32)
    start = (zero, zero, jax.tree.map(jnp.zeros_like, params))
    return jax.lax.scan(add_micro, start, batch)[0]


def _acceptable(guard: Guard, loss: Array, norm: Array, controls: Controls) -> Bool[Array, ""]:
    """Finite, not far above what the window holds, and the run not halted."""
    size = guard.losses.shape[0]
    held = (jnp.arange(size) < guard.accepted).astype(jnp.float32)
    spike = loss > spike_limit(guard.losses, held, controls.sigma)
    spike |= norm > spike_limit(guard.norms, held, norm_sigma(controls.sigma, guard.streak))
    finite = jnp.isfinite(loss) & jnp.isfinite(norm)
    halted = guard.streak >= controls.halt_after
    judged = can_judge(guard.accepted, size, guard.streak) & (controls.sigma > 0)
    return finite & ~(judged & spike) & ~halted


def _remember(guard: Guard, loss: Array, norm: Array, ok: Array) -> Guard:
    place = guard.accepted % guard.losses.shape[0]
    one = ok.astype(jnp.int32)
    return Guard(
        losses=guard.losses.at[place].set(jnp.where(ok, loss, guard.losses[place])),
        norms=guard.norms.at[place].set(jnp.where(ok, norm, guard.norms[place])),
        accepted=guard.accepted + one,
        streak=jnp.where(ok, 0, guard.streak + 1),
        skipped=guard.skipped + 1 - one,
    )


def abstract_batch(
    rows: int, grad_accum_steps: int, model: ModelConfig, mesh: Mesh, packed: bool = False
) -> Batch:
    """Shapes, types and shardings of a step's batch of `rows` sequences in `grad_accum_steps` parts.

    packed: as `StepConfig` has it.
    """
    sharding = batch_sharding(mesh)

    def leaf(dtype: Any, *more: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(
            (grad_accum_steps, rows // grad_accum_steps, *more), dtype, sharding=sharding
        )

    ids, length = id_dtype(model.vocab_size), model.context
    if packed:
        of_places = (leaf(jnp.int32, length), leaf(jnp.int32, length))
        return Batch(leaf(jnp.int32, length), leaf(jnp.bool_), leaf(jnp.uint32), *of_places)
    return Batch(leaf(ids, length + 1), leaf(jnp.bool_), leaf(jnp.uint32))


def lower_step(config: StepConfig, rows: int, grad_accum_steps: int, mesh: Mesh) -> jax.stages.Lowered:
    """`train_step` for batches of `rows` sequences over a mesh, before it is compiled; no arrays are made."""
    return lower_for(config, mesh, *abstract_inputs(config, rows, grad_accum_steps, mesh))


def abstract_inputs(config: StepConfig, rows: int, grad_accum_steps: int, mesh: Mesh) -> tuple[Any, ...]:
    """Shapes, types and shardings of what the step takes: those of `train_step`."""
    types = Controls(
        lr=jnp.float32, sigma=jnp.float32, halt_after=jnp.int32, seed=jnp.uint32,
        watch=jnp.bool_ if config.watches else None,
    )  # fmt: skip
    controls = jax.tree.map(lambda t: jax.ShapeDtypeStruct((), t, sharding=replicated(mesh)), types)
    batch = abstract_batch(rows, grad_accum_steps, config.model, mesh, config.packed)
    frozen = () if config.lora is None else (abstract_model(config, mesh),)
    return abstract_state(config, mesh), batch, controls, *frozen


def lower_for(
    config: StepConfig, mesh: Mesh, state: TrainState, batch: Batch, controls: Controls, *frozen: Params
) -> jax.stages.Lowered:
    """`train_step` for inputs of these shapes, types and shardings."""
    step = jax.jit(
        functools.partial(train_step, config),
        donate_argnums=0,
        out_shardings=(jax.tree.map(lambda leaf: leaf.sharding, state), replicated(mesh)),
    )
    return step.lower(state, batch, controls, *frozen)


def compile_step(config: StepConfig, rows: int, grad_accum_steps: int, mesh: Mesh) -> jax.stages.Compiled:
    """Compiles `train_step` for batches of `rows` sequences; the state is donated.

    Returns:
        A function (state, batch, controls, and what is frozen) -> (state, metrics) that refuses other shapes.
    """
    lowered = lower_step(config, rows, grad_accum_steps, mesh)
    return lowered.compile(compiler_options=dict(config.compiler_options))
