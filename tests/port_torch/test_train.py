"""Training of the mirror against transformers with PyTorch's AdamW, against train_tpu, and against itself."""

import contextlib
import dataclasses
import json
import os
import signal
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from core.checkpoint.checkpointer import Checkpointer, restore
from core.checkpoint.manifest import EXPORT_MANIFEST, load_manifest
from core.checkpoint.steps import Keep, find_step, list_steps
from core.config import PRESETS, ModelConfig
from core.data.batches import train_batches
from core.data.dataset import Dataset
from core.data.prepare import open_or_prepare
from core.data.sequences import Rows, heldout_sets
from core.documents import DocumentMark, document_mark
from core.errors import UserError
from core.model import Compute
from core.run.cadence import Flags
from core.run.interrupt import EXIT_HALTED, EXIT_KEPT, EXIT_SAVED
from core.run.log import read_log
from core.run.rates import preset_rate
from core.run.schedule import OptimizerConfig, learning_rate
from core.sharding import make_mesh
from core.tokenizer import load_tokenizer
from kernels_cuda import library
from port_torch import train as torch_train
from port_torch.export import reader
from port_torch.model import Decoder, load, parameter_name
from port_torch.names import exported_tensors
from port_torch.training import checkpoint, pretraining, trainer
from port_torch.training.batches import empty_rows, pretraining_batches
from port_torch.training.distributed import Distributed
from port_torch.training.evaluate import score
from port_torch.training.pretraining import fresh_decoder
from port_torch.training.settings import MirrorOptimizerConfig
from port_torch.training.setup import load_kernels
from port_torch.training.step import METRICS
from tests.models import random_params
from tests.port_torch.folders import SMALL, manifest_of, tensors_of, write_export
from tests.port_torch.small_training import (
    ALONE,
    TINY,
    Killed,
    kill,
    losses,
    make_train_step,
    plain_losses,
    sequences_of,
    stop_before,
    theirs_of,
    train_here,
    update_losses,
)
from tests.train_tpu.processes import refusal, run, start, without
from train_tpu.config import defaults as training_defaults
from train_tpu.engine import place_batch
from train_tpu.evaluate import Evaluator
from train_tpu.step import (
    Controls,
    GuardConfig,
    StepConfig,
    TrainState,
    abstract_state,
    compile_step,
    fresh_state,
)

STEPS, BATCH = 8, 4
OPTIM = MirrorOptimizerConfig(lr=1e-2, warmup=3, clip=0.5, eps=1e-6)
RATES = [learning_rate(OPTIM, step, STEPS) for step in range(STEPS)]

# Float32 sums in another order differ by about 1e-7 of the value. Adam's first updates have the size of the
# learning rate whatever the gradient's, so where a gradient is all rounding they may differ wholly: eps of
# 1e-6 is above that noise. What is left is amplified by two orders at most in 8 updates.
TOLERANCE = {"rtol": 2e-5}


@pytest.fixture(scope="session")
def dataset(cache: Path, text: Path) -> Dataset:
    return open_or_prepare(str(text), "bytes", 96, cache / "data")


@pytest.fixture(scope="session")
def data32(cache: Path, text: Path) -> Path:
    """Prepared for the runs of `TINY`."""
    return open_or_prepare(str(text), "bytes", 32, cache / "data").path


@pytest.fixture(scope="module")
def finished(data32, cache) -> Path:
    """An uninterrupted run."""
    folder = cache / "torch-finished"
    with pytest.MonkeyPatch.context() as patch:
        assert train_here(patch, *TINY, "--data", data32, "--out", folder) == 0
    return folder


def batches_of(
    dataset: Dataset, rows: slice = slice(0, BATCH), mark: DocumentMark | None = None
) -> list[Rows]:
    made = pretraining_batches(train_batches(dataset, seed=3, batch=BATCH, rows=rows, vocab_size=258), mark)
    taken = [next(made).rows for _ in range(STEPS)]
    made.close()
    return taken


def decoder_of(config: ModelConfig) -> Decoder:
    """With parameters of which each matters, at a size that trains."""
    params = random_params(config, std=0.1)
    tensors = tensors_of(config, params)
    model = Decoder(config)
    model.load_state_dict({parameter_name(leaf): tensors[n] for n, leaf in exported_tensors(config).items()})
    return model


@pytest.mark.parametrize("kind", SMALL)
def test_equal_to_transformers_with_torch_adamw(kind: str, dataset: Dataset, tmp_path: Path):
    config = SMALL[kind]
    folder = write_export(tmp_path / "folder", config, random_params(config, std=0.1))
    train_step = make_train_step(load(folder), OPTIM, z_loss=1e-3)
    batches = batches_of(dataset)
    ours = update_losses(train_step, batches, RATES, parts=2)
    theirs = plain_losses(
        theirs_of(folder, config), [sequences_of(b) for b in batches], RATES, OPTIM, z_loss=1e-3
    )
    assert theirs[-1][0] < theirs[0][0] - 0.5  # it trains
    assert all(row[2] > OPTIM.clip for row in theirs[:2])  # and is clipped
    np.testing.assert_allclose(ours, theirs, **TOLERANCE)


@pytest.mark.parametrize("masked", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_equal_to_train_tpu_from_the_first_parameters_on(masked: bool, dataset: Dataset, tmp_path: Path):
    """Parameters to the bit, then losses, gradient norms and a held-out score; also where each continues
    halfway what the other has saved. masked: with attention and positions that end at documents."""
    mark = document_mark(load_tokenizer("bytes")) if masked else None
    config, optim = SMALL["llama"], OptimizerConfig(**dataclasses.asdict(OPTIM))
    config = dataclasses.replace(config, scaled_residual_init=True)
    mesh = make_mesh()
    step_config = StepConfig(
        config, optim, GuardConfig(sigma=0), Compute(mesh=mesh), 1e-3, 8192, documents=mark
    )
    state = fresh_state(step_config, mesh, 5)
    decoder = fresh_decoder(config, 5)
    ours, read = dict(decoder.named_parameters()), reader(state.params)
    for leaf in exported_tensors(config).values():
        assert torch.equal(ours[parameter_name(leaf)], read(leaf))
    assert 0.8 < decoder.layers[0].mlp.down.weight.std() / (0.02 / 6**0.5) < 1.2  # std over sqrt(2 layers)
    train_step = make_train_step(decoder, OPTIM, z_loss=1e-3)
    step = compile_step(step_config, BATCH, 1, mesh)
    half, batches = STEPS // 2, batches_of(dataset, mark=mark)

    def jax_updates(state: TrainState, steps: range) -> tuple[TrainState, list[list[float]]]:
        made, first = [], steps[0] * BATCH
        loading = train_batches(dataset, seed=3, batch=BATCH, start=first, vocab_size=258)
        for number, loaded in zip(steps, loading, strict=False):
            controls = Controls(np.float32(RATES[number]), np.float32(0), np.int32(10), np.uint32(5))
            state, metrics = step(state, place_batch(loaded, BATCH, 1, mesh), controls)
            made.append([float(metrics.loss), float(metrics.nll), float(metrics.grad_norm)])
        return state, made

    def same(made: list[list[float]], wanted: list[list[float]]) -> None:
        made, wanted = np.array(made), np.array(wanted)
        np.testing.assert_allclose(made[:, :2], wanted[:, :2], rtol=1e-5)
        np.testing.assert_allclose(made[:, 2], wanted[:, 2], rtol=1e-4)

    saved = dataclasses.replace(manifest_of(config), kind="train")
    state, theirs = jax_updates(state, range(half))
    with Checkpointer(tmp_path / "jax", Keep()) as checkpointer:
        checkpointer.save(saved.step, state, saved)
    state, rest = jax_updates(state, range(half, STEPS))
    theirs += rest
    ours = update_losses(train_step, batches[:half], RATES[:half])
    code = saved.code | {"torch": torch.__version__}
    checkpoint.save(tmp_path / "torch", train_step, dataclasses.replace(saved, code=code), Keep())
    ours += update_losses(train_step, batches[half:], RATES[half:])
    same(ours, theirs)

    changed = restore(find_step(tmp_path / "torch"), abstract_state(step_config, mesh))
    same(jax_updates(changed, range(half, STEPS))[1], theirs[half:])
    changed = make_train_step(fresh_decoder(config, 6), OPTIM, z_loss=1e-3)
    checkpoint.restore(find_step(tmp_path / "jax"), changed)
    same(update_losses(changed, batches[half:], RATES[half:]), ours[half:])

    (heldout,) = heldout_sets(dataset, mark)
    evaluator = Evaluator(config, Compute(mesh=mesh), [heldout], 3, 8192, mesh)
    for limit in (None, 2):
        expected, found = evaluator.score(state.params, "valid", limit), score(train_step, heldout, 3, limit)
        np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_accumulation_equals_the_big_batch(dataset: Dataset):
    made = [
        update_losses(make_train_step(decoder_of(SMALL["gpt"]), OPTIM), batches_of(dataset), RATES, parts)
        for parts in (1, 4)
    ]
    np.testing.assert_allclose(made[1], made[0], **TOLERANCE)


def test_ranks_read_disjoint_rows_of_the_same_batches(dataset: Dataset):
    whole, parts = batches_of(dataset), [batches_of(dataset, rows) for rows in (slice(0, 2), slice(2, 4))]
    for number, batch in enumerate(whole):
        joined = np.concatenate([part[number].tokens for part in parts])
        assert np.array_equal(joined, batch.tokens)
    with pytest.raises(UserError, match="not divisible by the 3 processes: the nearest that is, is 3"):
        dataclasses.replace(ALONE, size=3).rows(4)


def test_a_batch_that_does_not_fit_is_computed_in_more_parts():
    train_step = make_train_step(decoder_of(SMALL["gpt"]), OPTIM)
    tried, room = [], [0]

    def losses(tokens, targets, documents, starts):
        tried.append(len(tokens))
        if len(tokens) > room[0]:
            raise torch.OutOfMemoryError("CUDA out of memory")
        hidden = train_step.decoder(tokens, documents=documents, starts=starts)
        return train_step.decoder.loss(hidden, targets)

    train_step.losses = losses
    before = [p.clone() for p in train_step.parameters.values()]
    for rows, room[0], given, parts, expected in (
        (8, 8, 1, 1, [8]), (8, 2, 1, 4, [8, 4, 2, 2]), (12, 3, 3, 6, [4, 2, 2]), (6, 5, 1, 2, [6, 3, 3])
    ):  # fmt: skip
        tried.clear()
        assert train_step.fit(rows, given, lambda n: empty_rows(n, 96, packed=False)) == parts
        assert tried == expected
    after = train_step.parameters.values()
    assert all(p.grad is None and torch.equal(p, b) for p, b in zip(after, before, strict=True))
    room[0] = 0
    with pytest.raises(UserError, match="a sequence of 96 tokens does not fit"):
        train_step.fit(8, 1, lambda n: empty_rows(n, 96, packed=False))


@pytest.mark.parametrize("kernels", ["auto", "cuda"])
def test_the_first_rank_decides_which_kernels_all_run(kernels: str, monkeypatch, capsys):
    """Where it has none nobody waits for it, compiles them again or runs others."""
    loads, told, source = [], [], [None]
    config = SimpleNamespace(kernels=kernels)

    def load(backend: str) -> library.Source:
        loads.append(backend)
        if source[0] is None and backend == "cuda":
            raise UserError("cannot use the CUDA kernels: nvcc fails")
        return library.Source(
            source[0], "plain PyTorch, because nvcc fails" if source[0] is None else "built"
        )

    monkeypatch.setattr(library, "load", load)
    monkeypatch.setattr(Distributed, "largest", lambda self, value: told.append(value) or max(told))
    ranks = [Distributed(rank, 2, torch.device("cpu")) for rank in (0, 1)]
    for rank in ranks:  # the first finds none
        with pytest.raises(UserError) if kernels == "cuda" else contextlib.nullcontext():
            load_kernels(config, rank)
    assert loads == [kernels] and told == [1, 0]
    told.clear(), loads.clear()
    source[0] = Path("built.so")
    load_kernels(config, ranks[0])
    source[0] = None  # the second has none of its own
    with pytest.raises(UserError) if kernels == "cuda" else contextlib.nullcontext():
        load_kernels(config, ranks[1])
        assert "kernels of process 1: plain PyTorch, because nvcc fails" in capsys.readouterr().err
    assert loads == [kernels] * 2 and told == [0, 0]


def test_an_update_that_is_not_finite_changes_nothing(dataset: Dataset):
    train_step = make_train_step(decoder_of(SMALL["gpt"]), OPTIM)
    rows = batches_of(dataset)[0]
    bias = train_step.decoder.layers[1].mlp.up.bias
    with torch.no_grad():
        bias[0] = torch.inf
    before = [p.clone() for p in train_step.parameters.values()]
    n = len(METRICS)
    made = train_step.update(rows, 1, 0, 0.1, Flags(stop=True))
    assert made[3:n].tolist() == [0.0, 1.0, 1.0, 1.0, 0.0, 0.0]
    assert not made[n:].isfinite().all() and len(made) == n + len(before)
    assert all(torch.equal(p, b) for p, b in zip(train_step.parameters.values(), before, strict=True))
    assert all(group["step"] == 0 for group in train_step.optimizer.param_groups)
    with torch.no_grad():
        bias[0] = 0
    made = train_step.update(rows, 1, 1, 0.1, Flags(late=True))
    assert made[3:n].tolist() == [1.0, 0.0, 1.0, 0.0, 1.0, 0.0]
    assert float(made[n:].square().sum().sqrt()) == pytest.approx(float(made[2]), rel=1e-6)
    assert not torch.equal(train_step.decoder.embed.weight, before[0])


def test_dropout_is_a_function_of_seed_and_step(dataset: Dataset):
    config = dataclasses.replace(SMALL["gpt"], dropout=0.3)
    train_step, rows = make_train_step(decoder_of(config), OPTIM), batches_of(dataset)[0]
    made = [float(train_step.update(rows, 2, step, 0.0)[0]) for step in (4, 5, 4)]
    assert made[0] == made[2] != made[1]


def test_a_run_writes_what_it_promises(finished: Path):
    assert [step for step, _, _ in losses(finished)] == list(range(12))
    evals = read_log(finished, "eval")
    assert [row["step"] for row in evals] == [0, 5, 10, 12]
    assert evals[-1]["bits_per_byte"] < evals[0]["bits_per_byte"] - 0.5
    assert list_steps(finished / "checkpoints") == [9, 12]
    assert list((finished / "tensorboard").iterdir())
    assert "===== step 12 =====" in (finished / "samples.txt").read_text()
    model = finished / "model"
    manifest = load_manifest(model, EXPORT_MANIFEST)
    assert (manifest.step, manifest.sequences, manifest.tokens) == (12, 48, 48 * 32)
    card = (model / "README.md").read_text()
    assert f"{evals[-1]['bits_per_byte']:.4g}" in card and "not tuned to follow" in card and "torch" in card
    assert str(finished.parent) not in "".join(p.read_text() for p in model.glob("*.json")) + card
    trained = dict(load(model).named_parameters())
    from safetensors.torch import load_file

    state = load_file(find_step(finished) / "state.safetensors")
    assert all(torch.equal(p, state[f"params/{name}"]) for name, p in trained.items())


@pytest.mark.parametrize("how", ["killed", pytest.param("asked to stop", marks=pytest.mark.slow)])
def test_a_resumed_run_is_equal_to_the_bit(
    how: str, finished: Path, data32: Path, tmp_path: Path, monkeypatch
):
    folder = tmp_path / "run"
    arguments = (*TINY, "--data", data32, "--out", folder)
    with monkeypatch.context() as patch:
        if how == "killed":
            stop_before(patch, 8, kill)
            with pytest.raises(Killed):
                train_here(patch, *arguments)
        else:
            stop_before(patch, 7, lambda: os.kill(os.getpid(), signal.SIGTERM))
            assert train_here(patch, *arguments) == EXIT_SAVED
    assert list_steps(folder / "checkpoints") == ([3, 6] if how == "killed" else [6, 8])
    assert not (folder / "model").exists()
    monkeypatch.setattr(pretraining, "fresh_decoder", None)  # a run that resumes draws no parameters
    assert train_here(monkeypatch, "--out", folder) == 0  # the settings are in the folder
    assert losses(folder) == losses(finished)
    ours, theirs = ((f / "model" / "model.safetensors").read_bytes() for f in (folder, finished))
    assert ours == theirs


def test_from_a_folder_and_on_with_a_finished_run(
    finished: Path, data32: Path, tmp_path: Path, monkeypatch, capsys
):
    assert train_here(monkeypatch, "--out", finished) == 0
    assert "has made its 12 updates" in capsys.readouterr().out
    folder = tmp_path / "run"
    arguments = (
        "--from",
        finished / "model",
        "--data",
        data32,
        "--out",
        folder,
        "--batch",
        "4",
        "--prompts",
        "a",
        "--eval-windows",
        "1000",
    )
    assert train_here(monkeypatch, *arguments, "--steps", "2") == 0
    first, last = read_log(folder, "eval")[0], read_log(finished, "eval")[-1]
    assert first["nll"] == pytest.approx(last["nll"], rel=1e-6)
    lineage = load_manifest(folder / "model", EXPORT_MANIFEST).lineage
    assert [entry["operation"] for entry in lineage] == ["export", "train", "export"]
    before = (folder / "model" / "model.safetensors").read_bytes()
    assert train_here(monkeypatch, *arguments, "--steps", "3", "--allow-change", "steps") == 0
    assert load_manifest(folder / "model", EXPORT_MANIFEST).step == 3
    assert (folder / "model" / "model.safetensors").read_bytes() != before


def test_a_start_that_ends_before_its_first_update_does_not_bind_the_next(
    data32: Path, tmp_path: Path, monkeypatch, capsys
):
    """An update that cannot be made, and a signal before it; the next one has other settings."""
    folder = tmp_path / "run"
    arguments = (*TINY, "--data", data32, "--out", folder)

    def refuse():
        raise UserError("the update does not fit")

    with monkeypatch.context() as patch:
        stop_before(patch, 0, refuse)
        with pytest.raises(UserError, match="does not fit"):
            train_here(patch, *arguments)
    assert not folder.exists()
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "announce", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
        assert train_here(patch, *arguments) == EXIT_KEPT
    assert (folder / "config.json").exists()
    capsys.readouterr()
    assert train_here(monkeypatch, *arguments, "--grad-accum-steps", "2", "--stop-at", "1") == 0
    assert capsys.readouterr().out.count("ended before its first update: this one replaces it") == 1
    with pytest.raises(UserError, match="--grad-accum-steps 2, not 1"):
        train_here(monkeypatch, *arguments, "--grad-accum-steps", "1")


@pytest.mark.slow
def test_an_older_step_is_resumed_and_newer_ones_are_left(
    finished: Path, data32: Path, tmp_path: Path, monkeypatch, capsys
):
    """Samples and evaluations off, too: what is not there is not named."""
    folder = tmp_path / "run"
    off = ("--sample-every", "0", "--eval-every", "0")
    assert train_here(monkeypatch, *TINY, "--data", data32, "--out", folder, *off, "--stop-at", "7") == 0
    assert list_steps(folder / "checkpoints") == [6, 7]
    with pytest.raises(UserError, match=r"--from-step 5 is not there: .* holds steps 6, 7"):
        train_here(monkeypatch, "--out", folder, "--from-step", "5")
    capsys.readouterr()
    assert train_here(monkeypatch, "--out", folder, "--from-step", "6") == 0
    assert (folder / "checkpoints" / "left-00000007").is_dir()
    assert losses(folder) == losses(finished)
    assert [row["step"] for row in read_log(folder, "eval")] == [12]
    assert not (folder / "samples.txt").exists() and "samples.txt" not in capsys.readouterr().out
    assert load_manifest(find_step(folder)).health["good"]


def test_a_checkpoint_without_a_guard_still_opens(finished: Path, monkeypatch):
    """As those were that an earlier version saved."""
    step_dir = find_step(finished)
    saved = load_manifest(step_dir)
    tree = {name: leaf for name, leaf in saved.tree.items() if not name.startswith("guard/")}
    assert len(tree) == len(saved.tree) - 5
    monkeypatch.setattr(checkpoint, "load_manifest", lambda _: dataclasses.replace(saved, tree=tree))
    decoder = Decoder(ModelConfig(**saved.config["model"]))
    assert checkpoint.restore(step_dir, make_train_step(decoder, OPTIM)).step == 12


@pytest.mark.slow
def test_a_diverged_run_is_halted_with_its_last_good_state(data32: Path, tmp_path: Path, monkeypatch):
    arguments = (*TINY, "--data", data32, "--out", tmp_path / "run", "--lr", "1e30", "--warmup", "0")
    assert train_here(monkeypatch, *arguments, "--steps", "20") == EXIT_HALTED
    skips = read_log(tmp_path / "run", "skip")
    assert [row["streak"] for row in skips] == list(range(1, 11)) and len(skips[0]["records"]) == 4
    assert list_steps(tmp_path / "run" / "checkpoints")[-1] <= 20


def test_its_learning_rates_are_adamws_and_its_help_says_so(tmp_path: Path, monkeypatch, capsys):
    """Muon's rates, which train_tpu.run has, are up to four times as high."""
    monkeypatch.chdir(tmp_path)
    for preset in PRESETS:
        config = torch_train.parse(["--preset", preset])
        assert config.optim.optimizer == "adamw"
        assert config.optim.lr is None  # until the run's length is known
        assert preset_rate(preset, "adamw") <= preset_rate(preset, "muon")
        assert config.optim.warmup == training_defaults(preset).optim.warmup
    with pytest.raises(SystemExit):
        torch_train.parse(["--preset", "mtlm2-40m", "--help"])
    said = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "optimizer is AdamW" in said and "with --optimizer muon both are as in train_tpu.run" in said
    assert "where none is given. (default: 0.0015)" in said and "(default: None)" not in said


def test_refusals(finished: Path, data32: Path, tmp_path: Path, monkeypatch):
    """One sentence, and nothing is there that was not."""
    new = ("--data", data32, "--out", tmp_path / "new")
    model = finished / "model"
    for arguments, message in (
        (("--preset", "mtlm3"), "unknown preset 'mtlm3'"),
        (("--device", "cuda"), "PyTorch finds no NVIDIA GPU"),
        (("--from", tmp_path / "no", *new), "is not there: give a folder"),
        (("--from", model, "--n-layers", "3", *new), "--n-layers and --from do not go together"),
        (("--from", model, "--tokenizer", "mistral", *new), "the tokenizers differ"),
        ((*TINY, "--grad-accum-steps", "3", *new), "--grad-accum-steps 3 does not divide the 4 rows"),
        (("--steps", "1", "--epochs", "1"), "--steps or --epochs, not both"),
        (("--beta1", "0"), "beta1 is 0"),
        (("--keep-last", "0"), "--keep-last is 0; it must be positive"),
        (("--kernels", "cuda", *TINY, *new), "cannot use the CUDA kernels"),
        (("--out", finished, "--lr", "0.5"), "has --lr 0.01, not 0.5"),
        (("--out", finished, "--seed", "1"), "has --seed 0, not 1"),
        (("--out", finished, "--allow-change", "nothing"), "'nothing', which is not a setting"),
        (("--out", finished, "--steps", "6", "--allow-change", "steps"), "is at step 12 already"),
        (
            ("--out", finished, "--steps", "24", "--allow-change", "steps"),
            "would jump at step 12 from 0.5 to 1 .*--steps 24 --schedule-start 12 --allow-change steps sch",
        ),
        ((*TINY, *new, "--prompts", "a" * 40), "prompt.* tokens long"),
        ((*TINY, "--data", data32, "--out", model / "config.json"), "is a file: name another folder"),
    ):
        with pytest.raises(UserError, match=message):
            train_here(monkeypatch, *arguments)
    assert not (tmp_path / "new" / "checkpoints").exists()


@pytest.mark.slow
def test_a_damaged_checkpoint_is_refused_or_passed_over(
    finished: Path, data32: Path, tmp_path: Path, monkeypatch
):
    folder = tmp_path / "run"
    assert train_here(monkeypatch, *TINY, "--data", data32, "--out", folder, "--stop-at", "7") == 0
    state = find_step(folder) / "state.safetensors"
    content = bytearray(state.read_bytes())
    content[-5] ^= 1
    state.write_bytes(content)
    with pytest.raises(UserError, match=r"state.safetensors does not match its sha256"):
        train_here(monkeypatch, "--out", folder)
    assert train_here(monkeypatch, "--out", folder, "--fallback") == 0
    assert losses(folder) == losses(finished)


@pytest.mark.slow
def test_a_full_disk_leaves_the_checkpoints(finished: Path, data32: Path, tmp_path: Path, monkeypatch):
    folder = tmp_path / "run"

    def full(tensors, path):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device", str(path))

    with monkeypatch.context() as patch:
        stop_before(patch, 5, lambda: patch.setattr("port_torch.training.checkpoint.save_file", full))
        with pytest.raises(OSError, match="No space left"):
            train_here(patch, *TINY, "--data", data32, "--out", folder)
    assert [entry.name for entry in (folder / "checkpoints").iterdir()] == ["00000003"]
    assert train_here(monkeypatch, "--out", folder) == 0 and losses(folder) == losses(finished)


@pytest.mark.slow
def test_processes_killed_and_asked_to_stop(finished: Path, data32: Path, cache: Path, tmp_path: Path):
    folder = tmp_path / "run"
    arguments = (*TINY, "--data", data32, "--out", folder)
    for wanted, number, code in (("step 4/", signal.SIGKILL, -9), ("step 7/", signal.SIGTERM, EXIT_SAVED)):
        process = start(cache, *arguments, module="port_torch.train")
        assert any(line.startswith(wanted) for line in process.stdout)
        process.send_signal(number)
        process.communicate(timeout=120)
        assert process.returncode in (code, 0)
    run(cache, *arguments, module="port_torch.train")
    assert losses(folder) == losses(finished)
    message = refusal(cache, "--out", folder, "--lr", "0.5", module="port_torch.train")
    assert "--allow-change lr" in message


@pytest.mark.slow
@pytest.mark.parametrize(("grad_accum_steps", "optimizer"), [("1", "adamw"), ("2", "adamw"), ("1", "muon")])
def test_two_processes_equal_one(
    grad_accum_steps: str, optimizer: str, data32: Path, cache: Path, tmp_path: Path, monkeypatch
):
    """Without dropout, whose masks are each rank's own."""
    arguments = (*without(TINY, "--dropout"), "--data", data32, "--grad-accum-steps", grad_accum_steps,
                 "--optimizer", optimizer)  # fmt: skip
    folders = [tmp_path / "one", tmp_path / "two"]
    assert train_here(monkeypatch, *arguments, "--out", folders[0]) == 0
    launch = ("--standalone", "--nproc-per-node", "2", "-m", "port_torch.train")
    out, _ = run(cache, *launch, *arguments, "--out", folders[1], module="torch.distributed.run", timeout=150)
    assert out.count("starting a new run") == 1
    np.testing.assert_allclose(losses(folders[1]), losses(folders[0]), **TOLERANCE)
    ours, theirs = (read_log(folder, "eval") for folder in folders)
    assert [row["nll"] for row in ours] == pytest.approx([row["nll"] for row in theirs], rel=2e-5)
    assert [row["scored_tokens"] for row in ours] == [row["scored_tokens"] for row in theirs]
    assert json.loads((folders[1] / "model" / "config.json").read_text())["hidden_size"] == 32
