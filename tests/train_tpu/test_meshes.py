"""Meshes: what --mesh means, how leaves lie on one, and that training on it is training on one device."""

import math
import re
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from core.checkpoint.manifest import load_manifest
from core.checkpoint.steps import find_step
from core.config import PRESETS, ModelConfig
from core.errors import UserError
from core.model import abstract_params
from core.sharding import MeshShape, check_mesh, parse_mesh, split_axes
from tests.models import BOTH
from tests.several_devices import run_on_devices
from tests.train_tpu.processes import TINY, losses, refusal, run

HERE = Path(__file__).parent
EIGHT = {"data": 1, "fsdp": 4, "tensor": 2}


def test_what_mesh_means():
    assert parse_mesh(None, 8) == parse_mesh("data=8", 8) == MeshShape(8, 1, 1)
    assert parse_mesh("fsdp=4,tensor=2", 8) == parse_mesh(" tensor=2, fsdp = 4", 8) == MeshShape(1, 4, 2)
    assert parse_mesh("tensor=1", 1) == MeshShape(1, 1, 1)
    for shape in (MeshShape(8), MeshShape(1, 4, 2), MeshShape(2, 2, 2), MeshShape()):
        assert parse_mesh(str(shape), math.prod(shape)) == shape


@pytest.mark.parametrize(
    "text, says",
    [
        ("fsdp", "cannot be read at 'fsdp'"),
        ("", "cannot be read at ''"),
        ("fsdp=4,", "cannot be read at ''"),
        ("fsdp=-4", "cannot be read at 'fsdp=-4'"),
        ("fsdp=0", "cannot be read at 'fsdp=0'"),
        ("fsdp=4=2", "cannot be read at 'fsdp=4=2'"),
        ("fsdp=²", "cannot be read"),
        ("model=8", "unknown axis 'model' in --mesh 'model=8': the axes are data, fsdp, tensor"),
        ("fsdp=2,fsdp=4", "repeated axis 'fsdp'"),
        ("tensor=2", "needs 2 devices, but there are 8: --mesh data=4,tensor=2 uses them all"),
        ("fsdp=3", "needs 3 devices, but there are 8: the sizes must multiply to 8"),
        ("fsdp=16", "--mesh fsdp=16 needs 16 devices, but there are 8"),
    ],
)
def test_a_wrong_mesh_is_told_in_a_sentence(text, says):
    with pytest.raises(UserError) as told:
        parse_mesh(text, 8)
    assert says in str(told.value) and "\n" not in str(told.value)


def test_a_mesh_that_does_not_fit_the_model_or_the_batch():
    model = ModelConfig(vocab_size=101, context=8, d_model=48, n_layers=1, n_heads=6, d_mlp=100)
    check_mesh(model, MeshShape(2, 4, 2), 16, 2)  # an odd vocabulary is no obstacle
    for shape, batch, grad_accum_steps, says in (
        (
            MeshShape(tensor=4),
            16,
            1,
            "heads 6 cannot be divided over tensor=4: --mesh data=2,tensor=2 fits it",
        ),
        (MeshShape(tensor=3), 16, 1, "d_mlp 100 cannot be divided over tensor=3"),
        (
            MeshShape(fsdp=5),
            20,
            1,
            "d_model 48 cannot be divided over fsdp=5: --mesh data=5 fits it",
        ),
        (
            MeshShape(2, 4, 2),
            12,
            1,
            "--batch 12 is not divisible by 8 devices (--mesh data=2,fsdp=4,tensor=2: data x",
        ),
        (
            MeshShape(2, 2),
            12,
            2,
            "--batch 12 is not divisible by 4 devices x --grad-accum-steps 2: the nearest that is, is 16",
        ),
    ):
        with pytest.raises(UserError) as told:
            check_mesh(model, shape, batch, grad_accum_steps)
        assert says in str(told.value)


@pytest.mark.parametrize(
    "shape", [MeshShape(fsdp=32), MeshShape(2, 1, 12), MeshShape(1, 9, 8), MeshShape(1, 5, 7)]
)
def test_the_mesh_that_is_proposed_fits_the_devices_and_the_model(shape):
    model = ModelConfig(vocab_size=101, context=8, d_model=48, n_layers=1, n_heads=6, d_mlp=100)
    batch = math.prod(shape)  # which every mesh of so many devices divides
    with pytest.raises(UserError) as told:
        check_mesh(model, shape, batch)
    proposed = re.search("--mesh ([^ ]*) fits it", str(told.value))[1]
    check_mesh(model, parse_mesh(proposed, math.prod(shape)), batch)


@pytest.mark.parametrize("kind", BOTH)
def test_every_large_leaf_is_split_by_its_path_and_never_over_layers(kind):
    model = BOTH[kind]
    for path, leaf in flat_shapes(model).items():
        names = tuple(path.split("/"))
        spec = split_axes(names, leaf.shape, EIGHT)
        assert "fsdp" in spec if names[-1] in ("kernel", "table") else spec == P(), path
        assert names[0] != "layers" or not spec or spec[0] is None, path
        # Moments lie as their parameter; what is not of a parameter is everywhere.
        assert split_axes(("opt_state", "[0]", "mu", *names), leaf.shape, EIGHT) == spec
        assert split_axes(names, leaf.shape, {"data": 8, "fsdp": 1, "tensor": 1}) == P()
    assert split_axes(("guard", "losses"), (128,), EIGHT) == P()


def test_columns_then_rows():
    """Megatron's rule: what is split is the axis between the two products of attention and of the MLP."""
    shapes = flat_shapes(PRESETS["mtlm2-40m"])

    def spec(path):
        return split_axes(tuple(path.split("/")), shapes[path].shape, EIGHT)

    for name in ("attn/q", "attn/k", "attn/v", "mlp/up"):
        assert spec(f"layers/{name}/kernel") == P(None, "fsdp", "tensor")
    for name in ("attn/o", "mlp/down"):
        assert spec(f"layers/{name}/kernel") == P(None, "tensor", "fsdp")
    assert spec("embed/table") == P("tensor", "fsdp") and spec("head/kernel") == P("fsdp", "tensor")
    assert spec("positions/table") == P(None, "fsdp")


def flat_shapes(model: ModelConfig) -> dict[str, jax.ShapeDtypeStruct]:
    leaves = jax.tree_util.tree_leaves_with_path(abstract_params(model))
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind, optimizer, dtype, kernels",
    [
        ("llama", "adamw", "float32", "xla"),
        ("llama", "muon", "float32", "xla"),
        ("gpt", "muon", "float32", "kernels"),
        ("odd", "adamw", "float32", "kernels"),
        ("llama", "muon", "bfloat16", "kernels"),
        ("gpt", "adamw", "bfloat16", "xla"),
        ("grouped", "adamw", "float32", "kernels"),
    ],
)
def test_every_mesh_equals_one_device(kind, optimizer, dtype, kernels, tmp_path):
    arguments = (kind, optimizer, dtype, kernels, str(tmp_path / "log"))
    run_on_devices(8, HERE / "meshes_on_devices.py", *arguments)


@pytest.mark.slow
def test_no_product_of_muon_is_computed_twice():
    run_on_devices(8, HERE / "muon_on_devices.py")


@pytest.mark.slow
def test_memory_falls_and_a_checkpoint_opens_under_any_mesh(tmp_path):
    run_on_devices(8, HERE / "layout_on_devices.py", str(tmp_path))


@pytest.mark.slow
def test_every_preset_lowers_on_every_mesh():
    # tensor=4 is refused where there are 2 heads (the tiny ones) or 6, and any tensor where they are 9 or 15.
    assert run_on_devices(8, HERE / "lower_on_devices.py") == "37 lowered, 11 refused\n"


@pytest.mark.slow
def test_cuda_calls_get_each_devices_own_part():
    assert run_on_devices(8, HERE / "kernels_on_devices.py") == "ok\n"


@pytest.mark.slow
def test_a_run_changes_its_mesh_when_asked_by_name(cache, text):
    common = (*TINY, "--batch", "8", "--data", text)
    run(cache, *common, "--out", cache / "one")
    folder = cache / "meshes"
    out, _ = run(cache, *common, "--out", folder, "--mesh", "fsdp=4,tensor=2", "--stop-at", "6", devices=8)
    assert "8 x cpu (cpu), fsdp=4,tensor=2, float32" in out
    refused = refusal(cache, *common, "--out", folder, "--mesh", "fsdp=8", devices=8)
    assert "has --mesh fsdp=4,tensor=2, not fsdp=8" in refused and "--allow-change mesh" in refused
    # On fewer devices the run's own mesh does not fit, and the sentence says so.
    assert "is for --mesh fsdp=4,tensor=2, but there are 1 devices here" in refusal(
        cache, *TINY, "--out", folder
    )
    allowed = (*common, "--out", folder, "--mesh", "data=2,fsdp=2,tensor=2", "--allow-change", "mesh")
    out, _ = run(cache, *allowed, devices=8)
    assert "at step 6" in out
    # As in test_run.py: sums in another order, amplified by 12 updates.
    np.testing.assert_allclose(np.array(losses(folder)), np.array(losses(cache / "one")), rtol=2e-5)
    assert load_manifest(find_step(folder)).step == 12
    # From its parameters, on yet another mesh.
    new = (*common, "--out", cache / "from", "--init-from", folder, "--mesh", "fsdp=2", "--steps", "2")
    run(cache, *new, devices=2)


@pytest.mark.slow
def test_the_layout_is_shown_and_nothing_is_trained(cache, text):
    command = (*TINY, "--data", text, "--batch", "8", "--out", cache / "shown", "--show-sharding")
    out, _ = run(cache, *command, "--mesh", "fsdp=4,tensor=2", devices=8)
    row = next(line for line in out.splitlines() if line.startswith("layers/mlp/down/kernel"))
    assert row.split() == [
        "layers/mlp/down/kernel",
        "2",
        "x",
        "64",
        "x",
        "32",
        "-,",
        "tensor,",
        "fsdp",
        "2,048",
        "6,144",
    ]
    assert not (cache / "shown").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "mesh, says",
    [
        ("fsdp=4,tensor=4", "needs 16 devices, but there are 8"),
        ("fsdp:8", "cannot be read at 'fsdp:8'"),
        ("data=2,tensor=4", "heads 2 cannot be divided over tensor=4"),
        ("fsdp=8", "--batch 4 is not divisible by 8 devices"),
    ],
)
def test_wrong_meshes_on_the_command_line(cache, text, mesh, says):
    told = refusal(cache, *TINY, "--data", text, "--out", cache / "wrong", "--mesh", mesh, devices=8)
    assert says in told and not (cache / "wrong").exists()
