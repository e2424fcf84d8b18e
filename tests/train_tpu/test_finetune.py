"""Fine-tuning in JAX: that of PyTorch on the same rows, packed or not, on any devices, resumed to the bit."""

import contextlib
import dataclasses
import functools
import io
import json
import os
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import pytest
import torch

from core.checkpoint.checkpointer import read_leaves, restore_params
from core.checkpoint.manifest import load_manifest, recorded_hash
from core.checkpoint.steps import find_step
from core.config import ModelConfig
from core.data.examples import Example
from core.data.row_packing import pack
from core.data.sequences import Batch as Packed
from core.data.sequences import Rows
from core.errors import UserError
from core.lora import MAPS, LoraConfig
from core.model import Compute, abstract_params
from core.run.guard import GuardConfig
from core.run.interrupt import EXIT_SAVED
from core.run.log import read_log
from core.run.schedule import OptimizerConfig
from core.sharding import make_mesh
from port_torch.model import Decoder, load, parameter_name
from port_torch.names import exported_tensors
from port_torch.training import finetuning
from port_torch.training.lora import add_adapters
from port_torch.training.lora import merged as merged_here
from port_torch.training.settings import MirrorOptimizerConfig
from tests.models import flat, random_params
from tests.port_torch.folders import SMALL, tensors_of, write_checkpoint, write_export
from tests.port_torch.small_training import Killed, finetune_here, kill, make_train_step, update_losses
from tests.several_devices import run_on_devices
from tests.train_tpu.processes import finish, losses, refusal_here, run_here, start_two, write_rows
from train_tpu.engine import JaxEngine, place_batch
from train_tpu.lora import A, init_adapters, merged, module_of
from train_tpu.step import Controls, StepConfig, compile_step, init_state

HERE = Path(__file__).parent
FIXTURES = HERE.parent / "fixtures" / "7b5e0bc"
COMMON = (
    "--steps", "6", "--batch", "2", "--lr", "0.003", "--warmup", "2", "--eps", "1e-6", "--validation", "0.2",
    "--weight-decay", "0.1", "--eval-every", "3", "--save-every", "2", "--log-every", "1", "--sample-every",
    "0",
)  # fmt: skip
LORA = ("--lora-rank", "4", "--lora-targets", "attention", "up", "--template", "plain")
KINDS = {"llama": (), "gpt": LORA}
"""All weights with new tokens of a template, and adapters."""


class Tuned(NamedTuple):
    """A run of each engine from the same parameters on the same rows."""

    start: Path
    jax: Path
    torch: Path
    options: tuple
    said: str


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl")


@pytest.fixture(scope="module")
def tuned(rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Tuned]:
    """Gives the runs of a kind, once made."""

    @functools.cache
    def made(kind: str) -> Tuned:
        root, config = tmp_path_factory.mktemp(kind), SMALL[kind]
        params, options = random_params(config, std=0.1), ("--data", rows, *COMMON, *KINDS[kind])
        start, export = write_checkpoint(root / "a", config, params), write_export(root / "b", config, params)
        said, _ = run_here(start, *options, "--out", root / "jax", module="train_tpu.finetune")
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()):
            patch.setattr(finetuning, "add_adapters", with_adapters_of_jax(finetuning.add_adapters))
            assert finetune_here(patch, export, *options, "--out", root / "torch") == 0
        return Tuned(start, root / "jax", root / "torch", options, said)

    return made


def write_start(folder: Path, kind: str, seed: int = 0, **changes) -> Path:
    """A checkpoint of parameters to start from."""
    config = dataclasses.replace(SMALL[kind], **changes)
    return write_checkpoint(folder, config, random_params(config, seed, std=0.1))


def with_adapters_of_jax(add):
    """PyTorch draws other first values of adapters: these are put in their place."""

    def added(decoder, config: LoraConfig, seed: int) -> None:
        add(decoder, config, seed)
        take_adapters(decoder, config, init_adapters(config, decoder.config, seed))

    return added


def take_adapters(decoder: Decoder, config: LoraConfig, adapters: dict) -> None:
    """Puts first values of adapters of JAX into the mirror."""
    for path in (MAPS[name].module for name in config.targets(decoder.config)):
        drawn = np.array(module_of(adapters, path)[A])
        within = ".".join(path.split("/")[1:])
        for layer, a in zip(decoder.layers, drawn, strict=True):
            layer.get_submodule(within).lora_A.default.weight.data = torch.from_numpy(a.T.copy())


def params_of(run: Path) -> tuple[ModelConfig, dict]:
    """The model in a run, and its parameters."""
    step_dir = find_step(run)
    config = ModelConfig(**load_manifest(step_dir).config["model"])
    return config, restore_params(step_dir, abstract_params(config))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_it_computes_what_port_torch_does(kind: str, tuned):
    """Losses, gradient norms, rates and held-out scores of every update, and the weights at the end."""
    tuned = tuned(kind)
    columns = {"train": ("step", "loss", "nll", "grad_norm", "lr", "tokens")}
    columns["eval"] = ("step", "nll", "bits_per_byte", "scored_tokens", "tokens")
    for what, names in columns.items():
        ours, theirs = (
            np.array([[row[name] for name in names] for row in read_log(run, what)]) for run in tuned[1:3]
        )
        assert len(ours) == {"train": 6, "eval": 3}[what]
        # Float32 sums in another order: see TOLERANCE of tests/port_torch/test_train.py.
        np.testing.assert_allclose(ours, theirs, rtol=2e-5)
    assert ours[-1, 1] < ours[0, 1] - 0.05
    config, params = params_of(tuned.jax)
    theirs, before = load(tuned.torch / "model"), params_of(tuned.start)[1]
    assert theirs.config == config
    expected = {name: p.detach() for name, p in theirs.named_parameters()}
    # Rounding is 1e-8 of these gradients at most, a hundredth of eps, and an update is of the rate's size.
    limit = 0.01 * sum(row["lr"] for row in read_log(tuned.jax, "train"))
    tensors = tensors_of(config, params)
    for name, place in exported_tensors(config).items():
        assert (tensors[name] - expected[parameter_name(place)]).abs().max() < limit, name
    query = [flat(tree)["layers/attn/q/kernel"] for tree in (before, params)]
    assert np.abs(query[0] - query[1]).max() > 20 * limit
    scales = [flat(tree)["norm/scale"] for tree in (before, params)]
    assert np.array_equal(*scales) is (kind == "gpt")  # which adapters leave


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_the_run_says_what_it_does_and_what_it_is(kind: str, tuned):
    tuned, adapted = tuned(kind), kind == "gpt"
    manifest = load_manifest(find_step(tuned.jax))
    assert [entry["operation"] for entry in manifest.lineage] == ["test", "finetune"]
    assert manifest.lineage[-1]["sha256"] == recorded_hash(tuned.start)
    assert "ssistant" in manifest.chat_template and manifest.step == 6
    assert "30 rows of 'chat', packed into " in tuned.said
    assert re.search(r"learned +[\d,]+ of [\d,]+ tokens", tuned.said)
    assert ("LoRA adapters of rank 4, at q, k, v, o, up" in tuned.said) is adapted
    assert ("2 of the template, each begun as the mean" in tuned.said) is not adapted
    assert f"python -m core.generate {tuned.jax} --chat" in tuned.said
    assert (f"--adapter-for {tuned.start}-torch" in tuned.said) is adapted
    arguments = (tuned.jax, "--chat", "--max-new-tokens", "3", "--temperature", "0")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"3 squared?\n")))
        answer, _ = run_here(*arguments, module="core.generate")
    assert answer.strip()
    done, _ = run_here(tuned.start, *tuned.options, "--out", tuned.jax, module="train_tpu.finetune")
    assert "has finished" in done


@pytest.mark.slow
@pytest.mark.parametrize("options", [(*LORA, "--lora-dropout", "0.2"), ()], ids=["lora", "all"])
def test_a_resumed_run_is_equal_to_the_bit(options: tuple, rows: Path, tmp_path: Path, monkeypatch):
    """Killed, then stopped by a signal, then to its end: losses, and every array of the last checkpoint."""
    start = write_start(tmp_path / "start", "gpt", dropout=0.1, n_layers=1)
    command = (start, "--data", rows, *COMMON, *options)
    run_here(*command, "--out", tmp_path / "whole", module="train_tpu.finetune")
    for step, how in ((5, kill), (4, lambda: os.kill(os.getpid(), signal.SIGTERM))):
        with monkeypatch.context() as patch:
            stop_before(patch, step, how)
            with pytest.raises(Killed) if how is kill else contextlib.nullcontext():
                run_here(*command, "--out", tmp_path / "cut", module="train_tpu.finetune", expect=EXIT_SAVED)
    run_here(*command, "--out", tmp_path / "cut", module="train_tpu.finetune")
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    arrays = []
    for name in ("whole", "cut"):
        step_dir = find_step(tmp_path / name)
        leaves = {
            path: jax.ShapeDtypeStruct(leaf["shape"], leaf["dtype"])
            for path, leaf in load_manifest(step_dir).tree.items()
        }
        arrays.append({path: np.asarray(array) for path, array in read_leaves(step_dir, leaves).items()})
    assert arrays[0].keys() == arrays[1].keys() and any("mu/" in path for path in arrays[0])
    for path, array in arrays[0].items():
        assert array.tobytes() == arrays[1][path].tobytes(), path


def stop_before(monkeypatch: pytest.MonkeyPatch, step: int, how) -> None:
    """Has `how` called just before the update of that step."""
    dispatch = JaxEngine.dispatch

    def stopping(self, batch, number, *rest):
        if number == step:
            how()
        return dispatch(self, batch, number, *rest)

    monkeypatch.setattr(JaxEngine, "dispatch", stopping)


@pytest.mark.parametrize("lora", [None, LoraConfig(lora_rank=3)])
def test_packed_rows_train_as_single_ones_do_and_as_in_pytorch(lora: LoraConfig | None, tmp_path: Path):
    """The loss of an update and the norm of its gradient, and what it makes of the parameters."""
    config = dataclasses.replace(SMALL["gpt"], context=24, n_layers=2)
    rng = np.random.default_rng(0)
    made = []
    for n in (5, 9, 24, 3, 7, 12, 11, 20):
        ids = rng.integers(0, config.vocab_size, n + 1).astype(np.int32)
        made.append(Example(ids[:-1], np.where(rng.random(n) < 0.5, ids[1:], -1).astype(np.int32), n))
    packed = pack(made, config.context)
    single = Rows(*(np.concatenate(parts) for parts in zip(*(pack([one], 24) for one in made), strict=True)))
    assert (len(packed.tokens), len(single.tokens)) == (4, 8)
    params, lr = random_params(config, std=0.1), 0.01
    optim = {"optimizer": "adamw", "eps": 1e-6, "clip": 0.5}
    mesh = make_mesh(devices=jax.devices()[:1])
    step = StepConfig(
        config, OptimizerConfig(**optim), GuardConfig(), Compute(mesh=mesh), 1e-3, 32, packed=True, lora=lora
    )
    controls = Controls(np.float32(lr), np.float32(8), np.int32(3), np.uint32(0))
    start = params if lora is None else init_adapters(lora, config, 0)
    found = []
    compiled = compile_step(step, 8, 2, mesh)
    for rows in (packed.filled(8), single):
        batch = place_batch(Packed(rows, 0, np.arange(8), np.zeros(8, bool)), 8, 2, mesh)
        state = init_state(step, jax.tree.map(jax.numpy.copy, start))
        frozen = () if lora is None else (params,)
        state, metrics = compiled(state, batch, controls, *frozen)
        whole = state.params if lora is None else merged(lora, config, params, state.params)
        found.append(([metrics.loss, metrics.nll, metrics.grad_norm], tensors_of(config, whole)))
    decoder = load(write_export(tmp_path / "start", config, params))
    if lora is not None:
        add_adapters(decoder, lora, 0)
        take_adapters(decoder, lora, start)
    (figures,) = update_losses(
        make_train_step(decoder, MirrorOptimizerConfig(**optim), z_loss=1e-3), [packed], [lr], parts=2
    )
    theirs = merged_here(decoder)
    found.append((figures, {name: theirs[parameter_name(p)] for name, p in exported_tensors(config).items()}))
    for figures, tensors in found[1:]:
        np.testing.assert_allclose(found[0][0], figures, rtol=1e-5)  # sums in another order
        for name, tensor in found[0][1].items():
            # Rounding is 1e-8 of these gradients, a hundredth of eps, and an update is of the rate's size.
            assert (tensor - tensors[name]).abs().max() < 0.01 * lr, name


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_every_mesh_and_two_processes_make_the_run_of_one_device(
    kind: str, rows: Path, cache, tmp_path: Path
):
    """Eight simulated devices in a process of their own, then two processes of two; dropout is on."""
    start = write_start(tmp_path / "start", kind, dropout=0.1)
    lora = (*KINDS[kind], *(["--lora-dropout", "0.2"] if KINDS[kind] else []))
    command = (str(start), "--data", str(rows), *COMMON, "--batch", "8", *lora)
    run_here(*command, "--out", tmp_path / "one", module="train_tpu.finetune")
    run_on_devices(8, HERE / "tuning_on_devices.py", str(tmp_path), *command)
    meshed = (*command, "--mesh", "fsdp=2,tensor=2", "--out", tmp_path / "two")
    ended = finish(start_two(cache, *meshed, module="train_tpu.finetune"))
    assert [code for code, _, _ in ended] == [0, 0], ended
    np.testing.assert_allclose(losses(tmp_path / "two"), losses(tmp_path / "one"), rtol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_the_run_is_opened_by_the_other_commands(kind: str, tuned, tmp_path: Path):
    """As it is: exported with its template, grown as parameters, which are tuned again."""
    tuned = tuned(kind)
    run_here(tuned.jax, tmp_path / "exported", module="port_torch.convert")
    config, _ = params_of(tuned.jax)
    ids = torch.arange(40)[None]
    opened = load(tmp_path / "exported")
    theirs, ours = load(tuned.torch / "model"), opened
    assert torch.allclose(ours.logits(ours(ids)), theirs.logits(theirs(ids)), atol=1e-3)
    cards = [(folder / "README.md").read_text() for folder in (tmp_path / "exported", tuned.torch / "model")]
    name = "plain" if kind == "gpt" else "chatml"
    for card in cards:
        for said in ("fine-tuned to converse", "| rows | rows.jsonl |", f"| template | {name} |"):
            assert said in card, said
    assert "| fine-tuned from | a |" in cards[0] and "| fine-tuned from | b |" in cards[1]
    tokenizer = json.loads((tmp_path / "exported" / "tokenizer_config.json").read_text())
    assert tokenizer["chat_template"] == load_manifest(find_step(tuned.jax)).chat_template
    said, _ = run_here(tuned.jax, "--out", tmp_path / "grown", module="stacking.grow")
    assert f"python -m train_tpu.finetune {tmp_path / 'grown'} --data" in said
    assert load_manifest(tmp_path / "grown").kind == "params"
    run_here(
        tmp_path / "grown", "--data", tuned.options[1], "--steps", "1", "--batch", "2", "--out",
        tmp_path / "again", module="train_tpu.finetune",
    )  # fmt: skip
    assert params_of(tmp_path / "again")[0].n_layers == 2 * config.n_layers


def test_refusals(rows: Path, tmp_path: Path, monkeypatch):
    start, out, run = (tmp_path / name for name in ("start", "out", "run"))
    write_start(start, "gpt", n_layers=1)
    other = write_start(tmp_path / "other", "gpt", seed=1, n_layers=1)
    new, old = ("--data", rows, "--out", out), ("--data", rows, "--out", run, "--steps", "1", "--batch", "2")
    old = (*old, "--validation", "0", "--sample-every", "0")
    run_here(start, *old, module="train_tpu.finetune")
    theirs, wrong = tmp_path / "theirs", tmp_path / "wrong.jsonl"
    wrong.write_text('{"prompt": "a"}\n')
    record = json.loads((FIXTURES / "torch" / "config.json").read_text())
    del record["run"]["preset"]
    theirs.mkdir()
    (theirs / "config.json").write_text(json.dumps(record))
    shutil.copy(FIXTURES / "torch" / "metrics.jsonl", theirs)
    for arguments, message in (
        ((start, "--data", wrong, "--out", out), "line 1 has the fields prompt"),
        ((start, "--data", tmp_path / "no", "--out", out), "cannot be read"),
        ((FIXTURES / "mtlm1-export", *new), "import it first"),
        ((tmp_path / "nothing", *new), "no checkpoint in"),
        ((start, "--data", rows, "--out", theirs), "is of port_torch.finetune"),
        ((start, *new, "--mesh", "data=3"), "needs 3 devices"),
        ((start, *new, "--batch", "3", "--grad-accum-steps", "2"), "--batch 3 is not divisible"),
        ((start, *new, "--lora-rank", "2", "--optimizer", "muon"), "muon is for the layers' matrices"),
        ((start, *new, "--lora-rank", "2"), "adapters do not train the embedding"),
        ((start, *new, "--lora-alpha", "2"), "give --lora-rank with it"),
        ((start, *new, "--template", "none"), "there is no template none"),
        ((start, "--data", rows, "--out", FIXTURES / "mtlm1-export"), "for PyTorch, and not an MTLM run"),
        ((other, *old), f"not started from the weights that are given now: give {start} as it was"),
        ((start, *old, "--seed", "1"), "has --seed 0"),
        ((start, *old, "--validation", "0.5"), "has --validation 0.0, not 0.5"),
    ):
        said = refusal_here(*arguments, module="train_tpu.finetune")
        assert message in said, (arguments, said)
    assert not out.exists()
    with pytest.raises(UserError, match=r"is of train_tpu\.finetune"):
        finetune_here(monkeypatch, FIXTURES / "mtlm1-export", *old)
    assert "is of train_tpu.finetune" in refusal_here("--out", run)
    assert "only runs that pretrain" in refusal_here(run, "--step", "0", module="train_tpu.replay.__main__")
