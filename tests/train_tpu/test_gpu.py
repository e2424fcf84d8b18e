"""Whole runs on NVIDIA GPUs."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from core.config import ModelConfig
from core.run.watching import read_watched
from tests.models import random_params
from tests.port_torch.folders import write_checkpoint, write_export
from tests.train_tpu.processes import TINY, finish, losses, make_text, run, start_two, without, write_rows

pytestmark = pytest.mark.gpu

GPU = {"JAX_PLATFORMS": "cuda", "XLA_PYTHON_CLIENT_PREALLOCATE": "false", "XLA_FLAGS": ""}
VISIBLE = os.environ.get("CUDA_VISIBLE_DEVICES", "0,1").split(",")
FIRST, SECOND = (GPU | {"CUDA_VISIBLE_DEVICES": number} for number in (VISIBLE[0], VISIBLE[-1]))
WIDE = (*without(without(TINY, "--d-model"), "--n-heads"), "--d-model", "128", "--n-heads", "2")
EXACT = ("--dtype", "float32", "--batch", "8")
# At TINY's rate the tenth update runs into gradients four times as large, which multiply rounding by some 60:
# what one order of sums makes of it says little about another's. At a tenth of the rate none grows.
STEADY = (*without(WIDE, "--lr"), *EXACT, "--lr", "1e-3")
ON_CPU = {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""}
HIGHEST = {"JAX_DEFAULT_MATMUL_PRECISION": "highest"}  # not in TensorFloat-32


def test_a_deterministic_run_resumes_to_the_bit(tmp_path):
    text = make_text(tmp_path)
    arguments = (*WIDE, "--data", text, "--deterministic", "--decay", "0")
    out, _ = run(tmp_path, *arguments, "--out", tmp_path / "whole", environ=FIRST)
    assert "xla: the reference, since triton cannot be used" in out
    for steps in ("7", "12"):
        more = ("--steps", steps, "--allow-change", "steps", "--out", tmp_path / "parts")
        run(tmp_path, *arguments, *more, environ=FIRST)
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")


def test_a_run_trains_with_cudnn_in_bfloat16(tmp_path):
    out, _ = run(tmp_path, *WIDE, "--data", make_text(tmp_path), "--out", tmp_path / "run", environ=FIRST)
    assert "cudnn: the fastest on a GPU" in out and "bfloat16" in out
    first, *_, last = losses(tmp_path / "run")
    assert last[1] < first[1]


@pytest.mark.parametrize("module", ["train_tpu.run", "port_torch.train"])
def test_watching_changes_no_update_and_compiles_nothing(module, tmp_path):
    """To the bit. A step of JAX that watches is another program than one that does not, so both runs have
    it: the flag alone differs. PyTorch's update is in both runs the recorded one."""
    arguments = (*WIDE, "--optimizer", "adamw", "--data", make_text(tmp_path), "--deterministic")
    more = ("--no-recompile",) if module == "train_tpu.run" else ()
    for every in ("3", "1000"):
        out = tmp_path / every
        run(tmp_path, *arguments, *more, "--watch-every", every, "--out", out, module=module, environ=FIRST)
    assert losses(tmp_path / "3") == losses(tmp_path / "1000")
    assert read_watched(tmp_path / "3").steps.tolist() == [0, 3, 6, 9]
    found = read_watched(tmp_path / "3")
    assert all(np.isfinite(values).all() for values in (*found.of_rows.values(), *found.of_layers.values()))


def test_a_document_mask_is_one_in_every_attention_and_in_pytorch(tmp_path):
    """On a CPU bfloat16 moved the losses of updates 1 to 3 by 5e-4 of them at most, in either engine; without
    the mask they are 16e-3 to 23e-3 higher."""
    arguments = (*without(without(WIDE, "--dropout"), "--context"), "--context", "128", "--sigma", "0",
                 "--data", make_text(tmp_path), "--document-mask")  # fmt: skip

    def curve(name: str, says: str, *more: str, module: str = "train_tpu.run") -> np.ndarray:
        environ = FIRST | (HIGHEST if name == "float32" else {})
        out, _ = run(tmp_path, *arguments, *more, "--out", tmp_path / name, module=module, environ=environ)
        assert says in " ".join(out.split())
        return np.array(losses(tmp_path / name))[1:4, 1]

    plain = ("--dtype", "float32", "--attention", "xla", "--kernels", "xla")
    exact = curve("float32", "xla within documents", *plain)
    for name in ("cudnn", "triton", "xla"):
        found = curve(name, f"{name} within documents", "--attention", name)
        np.testing.assert_allclose(found, exact, rtol=3e-3, err_msg=name)
    found = curve("torch", "each document by its length", module="port_torch.train")
    np.testing.assert_allclose(found, exact, rtol=3e-3)


def test_tuning_on_rows_is_that_of_pytorch(tmp_path):
    """In bfloat16 on the kernels of each; see above for the tolerance. At first adapters add nothing."""
    config = ModelConfig(vocab_size=258, context=128, d_model=128, n_layers=2, n_heads=2, d_mlp=256)
    params = random_params(config, std=0.05)
    start = write_checkpoint(tmp_path / "start", config, params)
    export = write_export(tmp_path / "export", config, params)
    arguments = (
        "--data", write_rows(tmp_path / "rows.jsonl"), "--template", "plain", "--validation", "0", "--batch",
        "4", "--steps", "6", "--lr", "3e-4", "--warmup", "1", "--sample-every", "0", "--log-every", "1",
        "--sigma", "0",
    )  # fmt: skip

    def curve(name: str, *more: str, module: str = "train_tpu.finetune") -> np.ndarray:
        out, _ = run(tmp_path, *more, *arguments, "--out", tmp_path / name, module=module, environ=FIRST)
        plain = "bfloat16, an update recorded as one CUDA graph"  # and not compiled
        says = plain if module.startswith("port_torch") else "cudnn within documents"
        assert says in " ".join(out.split())
        return np.array(losses(tmp_path / name))[:, 1]

    expected = curve("torch", export, module="port_torch.finetune")
    assert expected[-1] < expected[0] - 0.02
    np.testing.assert_allclose(curve("all", start), expected, rtol=3e-3)
    adapted = curve("lora", start, "--lora-rank", "8", "--lora-dropout", "0.1")
    np.testing.assert_allclose(adapted[0], expected[0], rtol=3e-3)
    assert adapted[-1] < adapted[0]


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    """The runs `whole` and `parts` of one GPU, which add up the same batches in two orders."""
    folder = tmp_path_factory.mktemp("alone")
    arguments = (*STEADY, "--data", make_text(folder))
    run(folder, *arguments, "--out", folder / "whole", environ=FIRST | HIGHEST)
    run(folder, *arguments, "--grad-accum-steps", "4", "--out", folder / "parts", environ=FIRST | HIGHEST)
    return folder


def apart(run_folder: Path, other: Path, after: int = 0) -> np.ndarray:
    """The largest distances of the losses and gradient norms of two runs after an update, as fractions."""
    ours, theirs = (np.array(losses(folder))[after:, 1:] for folder in (run_folder, other))
    return np.abs(ours / theirs - 1).max(axis=0)


def assert_equals_one(run_folder: Path, alone: Path) -> None:
    """The first update to float32's rounding; what 12 updates make of it, to what another order of sums
    alone makes of it."""
    np.testing.assert_allclose(losses(run_folder)[0], losses(alone / "whole")[0], rtol=2e-5)
    noise, of_two = (apart(folder, alone / "whole") for folder in (alone / "parts", run_folder))
    assert (of_two <= 4 * noise + 1e-6).all(), (of_two, noise)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_pytorch_continues_a_run_on_the_same_gpu(tmp_path, optimizer):
    """As tests/test_change_of_engine.py has it on a CPU, in float32; and back again. The measure is how far
    either engine goes from its own run when it makes the same updates on the CPU."""
    exact = (*without(without(WIDE, "--dropout"), "--optimizer"), *EXACT, "--optimizer", optimizer)
    arguments = (*exact, "--data", make_text(tmp_path), "--keep-steps", "4")
    whole, changed, whole_on_cpu, changed_on_cpu = (tmp_path / name for name in ("gpu", "2", "cpu", "4"))
    run(tmp_path, *arguments, "--out", whole, environ=FIRST | HIGHEST)
    for folder in (changed, whole_on_cpu, changed_on_cpu):
        shutil.copytree(whole, folder)
    run(tmp_path, "--out", whole_on_cpu, "--from-step", "4", environ=ON_CPU)
    for folder, environ in ((changed, FIRST), (changed_on_cpu, ON_CPU)):
        more = ("--out", folder, "--from-step", "4", "--stop-at", "8")
        out, _ = run(tmp_path, *more, module="port_torch.train", environ=environ)
        assert f"resuming in PyTorch {folder} at step 4" in out
        out, _ = run(tmp_path, "--out", folder, environ=FIRST | HIGHEST)
        assert f"resuming in JAX {folder} at step 8" in out

    of_changed = apart(changed, whole, after=4)
    noise = np.maximum(apart(whole_on_cpu, whole, after=4), apart(changed_on_cpu, changed, after=4))
    assert (of_changed <= 10 * noise + 1e-6).all(), (of_changed, noise)
    assert (noise < 1e-3).all()  # or it would say nothing


@pytest.mark.two_gpus
@pytest.mark.parametrize("mesh", ["data=2", "fsdp=2", "tensor=2"])
def test_two_gpus_make_the_run_of_one(tmp_path, alone, mesh):
    arguments = (*STEADY, "--data", alone / "text.jsonl", "--mesh", mesh)
    out, _ = run(alone, *arguments, "--out", tmp_path / "two", environ=GPU | HIGHEST)
    assert "devices     2 x" in out
    assert_equals_one(tmp_path / "two", alone)


@pytest.mark.two_gpus
def test_two_processes_of_a_gpu_each_make_the_run_of_one(tmp_path, alone):
    arguments = (*STEADY, "--data", alone / "text.jsonl", "--out", tmp_path / "two")
    for more in (("--stop-at", "7"), ()):
        ended = finish(start_two(alone, *arguments, *more, environs=(FIRST | HIGHEST, SECOND | HIGHEST)))
        assert [code for code, _, _ in ended] == [0, 0], ended
    assert_equals_one(tmp_path / "two", alone)


@pytest.mark.two_gpus
def test_cudnn_on_two_gpus(tmp_path):
    """Each GPU computes the attention of its own rows: the first loss is that of one GPU in bfloat16."""
    arguments = (*WIDE, "--batch", "8", "--data", make_text(tmp_path))
    run(tmp_path, *arguments, "--out", tmp_path / "one", environ=FIRST)
    out, _ = run(tmp_path, *arguments, "--out", tmp_path / "two", environ=GPU)
    assert "cudnn: the fastest on a GPU" in out and "devices     2 x" in out
    (_, one, _), *_ = losses(tmp_path / "one")
    (_, two, _), *_, (_, last, _) = losses(tmp_path / "two")
    # A hidden state's rounding, 2^-9, in the mean of 256 tokens' losses.
    assert two == pytest.approx(one, rel=2**-9) and last < two
