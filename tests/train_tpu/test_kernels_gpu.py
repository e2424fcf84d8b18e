"""The CUDA kernels in JAX, on a GPU: each op against float64, whole steps against XLA's, what they launch."""

import functools
import itertools
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import kernels_cuda.ops  # noqa: F401  declares the references
from core.config import ModelConfig
from core.model import init_params
from core.ops import Kernels
from core.run.schedule import OptimizerConfig
from core.sharding import make_mesh
from kernels_cuda.registry import reference
from tests.kernels import REFERENCE
from tests.models import flat
from tests.reference import logits64
from tests.several_devices import ROOT
from tests.train_tpu.processes import losses, make_text, run
from train_tpu.backend import choose_kernels, choose_step
from train_tpu.config import RunConfig
from train_tpu.step import Batch, Controls, GuardConfig, compile_step, init_state

pytestmark = pytest.mark.gpu

EPS = 1e-6
TYPES = (jnp.bfloat16, jnp.float32)
GPT = ModelConfig(
    vocab_size=512, context=128, d_model=384, n_layers=2, n_heads=6, d_mlp=512,
    positions="learned", mlp="gelu", biases=True, tied=False,
)  # fmt: skip
MODELS = {
    "llama": ModelConfig(vocab_size=512, context=128, d_model=768, n_layers=2, n_heads=12, d_mlp=1024),
    "gpt": GPT,
    "grouped": ModelConfig(
        vocab_size=512, context=128, d_model=512, n_layers=2, n_heads=8, n_kv_heads=2, d_mlp=512, qk_norm=True
    ),
}
ROWS = 8


@pytest.fixture(scope="module")
def kernels() -> Kernels:
    """XLA must never be taken for a kernel."""
    found = choose_kernels("cuda", jax.devices()[0]).kernels
    assert found is not None
    return found


def normal(seed: int, shape: tuple[int, ...], dtype=jnp.float32, scale: float = 1.0) -> jax.Array:
    return (scale * jax.random.normal(jax.random.key(seed), shape)).astype(dtype)


def wide(x: jax.Array) -> torch.Tensor:
    """The same values in float64, on the host."""
    return torch.tensor(np.asarray(x.astype(jnp.float32))).double()


def error(found: jax.Array, exact: torch.Tensor) -> float:
    """Root mean square of the difference over that of the exact values."""
    return ((wide(found) - exact).pow(2).mean() / exact.pow(2).mean().clamp(min=1e-60)).sqrt().item()


def assert_as_good(kernels: Kernels, function, exact, *inputs, name: str = "") -> None:
    """On the kernels every result has at most twice the error of the same formula in XLA, and two calls give
    equal bits; see tests/kernels_cuda/gpu.py for the bound."""
    on_kernels = jax.jit(functools.partial(function, kernels))
    ours, again = on_kernels(*inputs), on_kernels(*inputs)
    theirs = jax.jit(functools.partial(function, REFERENCE))(*inputs)
    for number, (a, b, c, true) in enumerate(zip(ours, again, theirs, exact, strict=True)):
        assert a.shape == c.shape and a.dtype == c.dtype, (name, number)
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes(), (name, number)
        assert bool(jnp.isfinite(a).all()), (name, number)
        mine, allowed = error(a, true), 2 * error(c, true) + 1e-6
        assert mine <= allowed, (name, number, mine, allowed)


# --- ops ---


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("d", [48, 128, 384, 512, 576, 768, 1024])
def test_norms(kernels: Kernels, d: int, dtype):
    for rows in (33, 8192):
        x, branch = normal(0, (rows, d), dtype, 3), normal(1, (rows, d), dtype)
        scale = 1 + normal(2, (d,), scale=0.25)
        d_normed, d_sum = normal(3, (rows, d), dtype), normal(4, (rows, d), dtype)
        total = x + branch  # rounded once, which is what gets normalised

        def every(ops, x, branch, scale, d_normed, d_sum):
            normed, total, rstd = ops.add_rms_norm(x, branch, scale, EPS)
            d_x, d_scale = ops.rms_norm_backward(d_normed, d_sum, total, rstd, scale)
            return normed, total, rstd, d_x, d_scale, *ops.rms_norm(x, scale, EPS)

        normed, rstd = reference.rms_norm(wide(total), wide(scale), EPS, torch.float64)
        d_x, _, d_scale = reference.rms_norm_backward(
            wide(d_normed), wide(d_sum), wide(total), rstd, wide(scale), False
        )
        alone = reference.rms_norm(wide(x), wide(scale), EPS, torch.float64)
        exact = (normed, wide(total), rstd, d_x, d_scale, *alone)
        assert_as_good(kernels, every, exact, x, branch, scale, d_normed, d_sum, name=f"{rows} rows")


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize(
    "heads, size", [((12, 12, 12), 64), ((9, 3, 3), 64), ((5, 1, 1), 128), ((3, 3, 3), 20)]
)
def test_rotation_and_packing(kernels: Kernels, heads: tuple[int, int, int], size: int, dtype):
    b, s = 3, 96
    parts = [normal(i, (b, s, n, size), dtype) for i, n in enumerate(heads)]
    packed = normal(9, (b, s, sum(heads) * size), dtype)
    for n_angles in (1, b):
        angle = 6 * jax.random.uniform(jax.random.key(5), (n_angles, s, size // 2))
        cos, sin = jnp.cos(angle), jnp.sin(angle)

        def every(ops, packed, q, k, v, cos, sin):
            unpacked = ops.rotary_unpack(packed, heads, (cos, sin))
            turned = (*ops.rotary(q, k, cos, sin, False), *ops.rotary(q, k, cos, sin, True))
            return *unpacked, *turned, ops.rotary_pack(q, k, v, (cos, sin))

        q, k, v, c, z = map(wide, (*parts, cos, sin))
        apart = wide(packed).view(b, s, sum(heads), size).split(heads, dim=2)
        turn = lambda x, sign, c=c, z=z: turned64(x, c, sign * z)  # noqa: E731
        exact = (
            turn(apart[0], 1), turn(apart[1], 1), apart[2],
            turn(q, 1), turn(k, 1), turn(q, -1), turn(k, -1),
            torch.cat([turn(q, -1), turn(k, -1), v], dim=2).view(b, s, -1),
        )  # fmt: skip
        assert_as_good(kernels, every, exact, packed, *parts, cos, sin)

    def moved(ops, packed, q, k, v):
        return *ops.rotary_unpack(packed, heads, ()), ops.rotary_pack(q, k, v, ())

    ours = jax.jit(functools.partial(moved, kernels))(packed, *parts)
    theirs = moved(REFERENCE, packed, *parts)
    jax.tree.map(np.testing.assert_array_equal, ours, tuple(theirs))


@pytest.mark.parametrize("rows, d, f", [(33, 64, 72), (8192, 768, 2176)])
def test_swiglu_in_products(kernels: Kernels, rows: int, d: int, f: int):
    if not kernels.product_types:
        pytest.skip("needs compute capability 9.0")
    x, d_y = (normal(seed, (rows, d), jnp.bfloat16) for seed in (0, 1))
    weight, down = (
        normal(seed, shape, jnp.bfloat16, d**-0.5) for seed, shape in ((2, (d, 2 * f)), (3, (f, d)))
    )
    gate_up = x @ weight

    def every(ops, x, weight, d_y, down, gate_up):
        return *ops.swiglu_product(x, weight), *ops.swiglu_product_backward(d_y, down, gate_up)

    exact = (
        *reference.swiglu_product(wide(x), wide(weight).T),
        *reference.swiglu_product_backward(wide(d_y), wide(down).T, wide(gate_up)),
    )
    assert_as_good(kernels, every, exact, x, weight, d_y, down, gate_up)


@pytest.mark.parametrize("rows, d, f", [(33, 64, 72), (8192, 384, 1024)])
def test_gelu_in_products(kernels: Kernels, rows: int, d: int, f: int):
    if not kernels.product_types:
        pytest.skip("needs compute capability 9.0")
    x, d_y = (normal(seed, (rows, d), jnp.bfloat16) for seed in (0, 1))
    weight, down = (normal(seed, shape, jnp.bfloat16, d**-0.5) for seed, shape in ((2, (d, f)), (3, (f, d))))
    bias = normal(4, (f,))
    up = (x @ weight + bias).astype(x.dtype)

    def every(ops, x, weight, bias, d_y, down, up):
        return *ops.gelu_product(x, weight, bias), *ops.gelu_product_backward(d_y, down, up)

    exact = (
        *reference.gelu_product(wide(x), wide(weight).T, wide(bias)),
        *reference.gelu_product_backward(wide(d_y), wide(down).T, wide(up)),
    )
    assert_as_good(kernels, every, exact, x, weight, bias, d_y, down, up)


@pytest.mark.parametrize(
    "b, s, d, heads, size",
    [(2, 17, 72, (3, 1, 1), 64), (3, 96, 576, (9, 3, 3), 64), (2, 100, 200, (3, 1, 1), 128),
     (64, 1024, 384, (6, 6, 6), 64)],
)  # fmt: skip
def test_the_product_of_q_k_and_v(
    kernels: Kernels, b: int, s: int, d: int, heads: tuple[int, int, int], size: int
):
    if not kernels.product_types:
        pytest.skip("needs compute capability 9.0")
    width = sum(heads) * size
    x, weight = normal(0, (b, s, d), jnp.bfloat16), normal(1, (d, width), jnp.bfloat16, d**-0.5)
    for n_angles, bias in itertools.product((0, 1, b), (None, normal(2, (width,)))):
        angle = 6 * jax.random.uniform(jax.random.key(5), (max(n_angles, 1), s, size // 2))
        angle = angle if n_angles else jnp.zeros_like(angle)
        cos, sin = jnp.cos(angle), jnp.sin(angle)

        def product(ops, x, weight, bias, cos, sin, rotates=n_angles > 0):
            return ops.qkv_product(x, weight, bias, heads, (cos, sin) if rotates else ())

        given = (wide(x), wide(weight).T, bias if bias is None else wide(bias), wide(cos), wide(sin))
        exact = reference.qkv_product(*given, heads).split(heads, dim=2)
        assert_as_good(kernels, product, exact, x, weight, bias, cos, sin, name=f"{n_angles} sets of angles")


def turned64(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    a, b = x.chunk(2, dim=-1)
    cos, sin = cos[:, :, None], sin[:, :, None]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("vocab", [97, 32000, 151936])
def test_softmax_loss(kernels: Kernels, vocab: int, dtype):
    rows = 300
    logits = normal(0, (rows, vocab), dtype, 3)
    targets = jax.random.randint(jax.random.key(1), (rows,), 0, vocab).at[::7].set(-1)
    for z_loss in (0.0, 1e-3) if vocab == 32000 else (1e-3,):
        exact, sums = wide(logits), torch.empty(2, rows, dtype=torch.float64)
        target64 = torch.tensor(np.asarray(targets), dtype=torch.int64)
        reference.softmax_loss_(exact, target64, sums[0], sums[1], z_loss, True)

        def passed(ops, logits, targets, z_loss=z_loss):
            return ops.softmax_loss(logits, targets, z_loss)

        assert_as_good(kernels, passed, (exact, sums[0], sums[1]), logits, targets)
    # In place, but what is needed again is kept: here XLA must copy.
    kept = jax.jit(lambda x, t: (kernels.softmax_loss(x, t, 0.0)[0], x * 1))(logits, targets)[1]
    np.testing.assert_array_equal(kept, logits)


@pytest.mark.parametrize("rows, d, vocab", [(300, 64, 1000), (3000, 384, 32000)])
def test_the_loss_in_its_product(kernels: Kernels, rows: int, d: int, vocab: int):
    if not kernels.product_types:
        pytest.skip("needs compute capability 9.0")
    hidden = normal(0, (rows, d), jnp.bfloat16)
    hidden = hidden.at[::50].multiply(100)  # far from their targets: some are computed again
    table = normal(1, (vocab, d), jnp.bfloat16, 3 * d**-0.5)
    targets = jax.random.randint(jax.random.key(2), (rows,), 0, vocab).at[::7].set(-1)

    def passed(ops, hidden, table, targets):
        exps, scale, total, nll = ops.loss_product(hidden, table, targets, 1e-3)
        return exps.astype(jnp.float32) * scale[:, None], total, nll

    exact, sums = wide(hidden) @ wide(table).T, torch.empty(2, rows, dtype=torch.float64)
    target64 = torch.tensor(np.asarray(targets), dtype=torch.int64)
    reference.softmax_loss_(exact, target64, sums[0], sums[1], 1e-3, True)
    assert_as_good(kernels, passed, (exact, sums[0], sums[1]), hidden, table, targets)


def test_adamw(kernels: Kernels):
    shapes = ((3,), (1000,), (48, 4096), (5, 7, 11))
    values = [[normal(10 * kind + i, shape) for i, shape in enumerate(shapes)] for kind in range(4)]
    values[3] = [jnp.abs(v) for v in values[3]]
    settings = (0.9, 0.9999, 1e-8, 0.1)
    for step, skip in itertools.product((1.0, 7.0), (False, True)):
        scalars = (jnp.float32(1e-2), jnp.float32(step), jnp.float32(0.5), jnp.array(skip))

        def update(ops, *arrays):
            lists = [list(arrays[4 * i : 4 * i + 4]) for i in range(4)]
            return tuple(itertools.chain(*ops.adamw(*lists, *arrays[16:], *settings)))

        exact = [[wide(v) for v in kind] for kind in values]
        lr, number, scale = (torch.tensor(float(x), dtype=torch.float64) for x in scalars[:3])
        reference.adamw_(*exact, [], lr, number, scale, torch.tensor(skip), *settings)
        inputs = (*itertools.chain(*values), *scalars)
        assert_as_good(
            kernels, update, [*exact[0], *exact[2], *exact[3]], *inputs, name=f"step {step}, skip {skip}"
        )


# --- steps ---


def batch(model: ModelConfig, step: int, parts: int = 1) -> Batch:
    """Tokens as frequent as words are, of which half repeat the one before: there is something to learn."""
    rng = np.random.default_rng(step)
    share = 1 / np.arange(1, model.vocab_size + 1)
    tokens = rng.choice(model.vocab_size, (ROWS, model.context + 1), p=share / share.sum())
    for at in range(1, model.context + 1):
        tokens[:, at] = np.where(rng.random(ROWS) < 0.5, tokens[:, at - 1], tokens[:, at])
    shape = (parts, ROWS // parts)
    index = np.arange(ROWS, dtype=np.uint32).reshape(shape)
    return Batch(tokens.astype(np.uint16).reshape(*shape, -1), np.zeros(shape, bool), index)


def train(model: ModelConfig, which: str, steps: int, parts: int = 1) -> tuple[np.ndarray, dict]:
    """The loss of every step; the gradient of the first."""
    mesh = make_mesh(devices=jax.devices()[:1])
    optim = OptimizerConfig(optimizer="adamw", clip=0.0)
    chosen = choose_kernels(which, jax.devices()[0]).kernels
    config, _ = choose_step(RunConfig(optim=optim, guard=GuardConfig(sigma=0)), model, mesh, chosen)
    step = compile_step(config, ROWS, parts, mesh)
    state = init_state(config, init_params(model, jax.random.key(0)))
    controls = Controls(np.float32(1e-3), np.float32(0), np.int32(10), np.uint32(0))
    seen, gradient = [], {}
    for i in range(steps):
        state, metrics = step(state, jax.device_put(batch(model, i, parts)), jax.device_put(controls))
        seen.append(float(metrics.loss))
        assert bool(metrics.applied)
        if i == 0:  # the first moment is a tenth of the gradient
            moments = flat(state.opt_state).items()
            gradient = {path.partition("mu/")[2]: 10 * m for path, m in moments if "mu/" in path}
    return np.array(seen), gradient


@pytest.mark.parametrize("kind", MODELS)
def test_the_first_gradient_is_no_further_from_float64_than_xlas(kind: str):
    model = MODELS[kind]
    params = init_params(model, jax.random.key(0))
    leaves = {
        name: torch.tensor(leaf, dtype=torch.float64, requires_grad=True)
        for name, leaf in flat(params).items()
    }
    tokens = batch(model, 0).tokens[0].astype(np.int64)
    scores = logits64(model, leaves, tokens[:, :-1])
    loss = torch.nn.functional.cross_entropy(scores.flatten(0, 1), torch.tensor(tokens[:, 1:]).flatten())
    loss.backward()
    exact = {name: leaf.grad.numpy() for name, leaf in leaves.items()}
    size = max(np.linalg.norm(g) for g in exact.values())
    (ours,), mine = train(model, "cuda", 1)
    (theirs,), xlas = train(model, "xla", 1)
    # A hidden state's rounding to bfloat16, 2^-9, in the mean of 1,024 tokens' losses.
    assert abs(ours - loss.item()) <= 2 * abs(theirs - loss.item()) + 2.0**-9
    for name, true in exact.items():
        apart, allowed = np.linalg.norm(mine[name] - true), np.linalg.norm(xlas[name] - true)
        # Both are draws of the same rounding, and logits are rounded once more: at most twice the error.
        assert apart <= 2 * allowed + 1e-6 * size, (name, apart, allowed)


def test_200_updates_within_what_another_order_of_sums_makes():
    def curve(which: str, parts: int = 1) -> np.ndarray:
        """Means of ten losses each."""
        return train(GPT, which, 200, parts)[0].reshape(-1, 10).mean(1)

    def apart(curve: np.ndarray) -> float:
        """Root mean square, since a single mean can be three times as far off in any of these runs."""
        return float(np.sqrt(np.square(curve - xla).mean()))

    xla = curve("xla")
    assert xla[-1] < xla[0] - 0.5  # it learns
    in_parts, cuda = [apart(curve("xla", parts)) for parts in (2, 4, 8)], apart(curve("cuda"))
    # Each is one draw of the distance that rounding makes: twice the largest of three draws.
    assert cuda <= 2 * max(in_parts) + 1e-3, (cuda, in_parts)


def test_deterministic_steps_are_equal_to_the_bit(tmp_path: Path):
    text = make_text(tmp_path)
    gpu = {"JAX_PLATFORMS": "cuda", "XLA_PYTHON_CLIENT_PREALLOCATE": "false", "XLA_FLAGS": ""}
    arguments = (
        "--preset", "mtlm1-tiny", "--tokenizer", "bytes", "--context", "64", "--d-model", "384",
        "--n-heads", "6", "--n-layers", "2", "--batch", "4", "--steps", "12", "--data", text,
        "--deterministic", "--kernels", "cuda",
    )  # fmt: skip
    for name in ("one", "two"):
        out, _ = run(tmp_path, *arguments, "--out", tmp_path / name, environ=gpu)
        said = r"cuda: rotation of q and k( in their product \(.*?\))?, AdamW, norms, loss"
        assert re.search(said, " ".join(out.split()))
    assert losses(tmp_path / "one") == losses(tmp_path / "two")


# --- what is launched ---

# In a process of its own: where XLA dumps is said when it starts.
COMPILE = """
import dataclasses, sys
import jax
from core.config import preset
from core.run.schedule import OptimizerConfig
from core.sharding import make_mesh
from train_tpu.backend import choose_kernels, choose_step
from train_tpu.config import RunConfig
from train_tpu.step import compile_step
name, kernels = sys.argv[1:]
model = dataclasses.replace(preset(name), n_layers=2)
mesh = make_mesh(devices=jax.devices()[:1])
run = RunConfig(preset=name, optim=OptimizerConfig(optimizer="adamw"))
step, _ = choose_step(run, model, mesh, choose_kernels(kernels, jax.devices()[0]).kernels)
print(compile_step(step, 16, 1, mesh).as_text())
"""


def compiled(preset: str, kernels: str, folder: Path) -> tuple[str, list[str]]:
    """A step's program, and the kinds of what it launches one after the other, as XLA dumps it."""
    flags = f"--xla_dump_to={folder} --xla_dump_hlo_module_re=.*train_step.*"
    more = {"JAX_PLATFORMS": "cuda", "XLA_PYTHON_CLIENT_PREALLOCATE": "false", "XLA_FLAGS": flags}
    command = [sys.executable, "-c", COMPILE, preset, kernels]
    done = subprocess.run(command, env={**os.environ, **more}, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    *_, file = sorted(folder.glob("*train_step*thunk_sequence*"))  # that after XLA's last changes
    lines = [line for line in file.read_text().splitlines() if line[:3].isdigit()]
    return done.stdout, [line.split(":", 1)[1].split()[0] for line in lines]


@pytest.mark.parametrize("preset", ["mtlm1-200m", "mtlm2-40m"])
def test_calls_are_inside_command_buffers_and_nothing_large_is_copied(
    kernels: Kernels, preset: str, tmp_path: Path
):
    program, launched = compiled(preset, "cuda", tmp_path / "cuda")
    loss = "loss_product" if kernels.product_types else "softmax_loss"
    apart = "qkv_product" if kernels.product_types else "rotary_unpack"
    assert all(f"mtlm_{name}" in program for name in (loss, apart, "adamw"))
    assert "kCommandBuffer" in launched and "kCustomCall" not in launched, launched
    assert len(launched) <= len(compiled(preset, "xla", tmp_path / "xla")[1])
    for line in program.splitlines():  # neither logits nor parameters and moments
        assert not re.search(r"(16384,32000\]|= f32\[2,\d+,\d+\]).* copy\(", line), line
