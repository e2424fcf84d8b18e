"""Every command that opens a folder names the one that takes it where it is of another kind."""

import dataclasses
import importlib
import re
import shutil
from pathlib import Path

import pytest

from core.checkpoint.manifest import EXPORT_MANIFEST, load_manifest, seal
from core.errors import UserError
from core.folder_kinds import ADVICE, Kind, kind_of, stale_model
from eval.models import open_model
from eval.questions import evaluated_folder

ROOT = Path(__file__).parents[2]
FIXTURES = ROOT / "tests" / "fixtures" / "7b5e0bc"
PACKAGES = ("core", "train_tpu", "stacking", "port_torch", "eval")
KINDS = {
    "mtlm1": Kind.CHECKPOINT,
    "mtlm2": Kind.CHECKPOINT,
    "torch": Kind.CHECKPOINT,
    "mtlm1-export": Kind.WEIGHTS,
    "data": Kind.DATA,
}


def refusal(module: str, *arguments: str | Path) -> str:
    """What a command says that refuses."""
    command = importlib.import_module(module)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(UserError) as refused:
        patch.setattr("sys.argv", [module, *map(str, arguments)])
        command.main()
    return str(refused.value)


def test_there_is_advice_for_every_kind_that_a_command_does_not_take():
    """Whatever a command is given for, as the sources of all commands have it."""
    sources = (file.read_text() for folder in PACKAGES for file in (ROOT / folder).rglob("*.py"))
    calls = [found for text in sources for found in re.findall(r"[^f] require_kind\((.*)\)\n", text)]
    purposes = {(purpose, call) for call in calls for purpose in re.findall(r'"(\w+)"', call)}
    assert {"generate", "chat", "replay", "grow"} <= {purpose for purpose, _ in purposes}
    for purpose, call in purposes:
        for kind in (Kind.CHECKPOINT, Kind.WEIGHTS):
            assert f"Kind.{kind.name}" in call or (purpose, kind) in ADVICE


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    """A run of port_torch with its model, in a folder whose name has a space."""
    run = shutil.copytree(FIXTURES / "torch", tmp_path / "a run")
    shutil.copytree(FIXTURES / "mtlm1-export", run / "model")
    return run


def test_what_a_folder_is(finished: Path, tmp_path: Path):
    for name, kind in KINDS.items():
        assert kind_of(FIXTURES / name) is kind
    for run in (FIXTURES / "mtlm1", finished):
        assert kind_of(run / "checkpoints") is kind_of(run / "checkpoints" / "00000012") is Kind.CHECKPOINT
    assert kind_of(finished / "model") is Kind.WEIGHTS
    for path in (tmp_path, tmp_path / "missing", FIXTURES / "text.txt"):
        assert kind_of(path) is Kind.OTHER


@pytest.mark.parametrize(
    ("module", "given", "advice"),
    [
        ("core.generate", "mtlm1-export", "python -m port_torch.generate {path}`"),
        ("core.generate", "data", "python -m train_tpu.run --data {path}`"),
        ("port_torch.generate", "mtlm1", "python -m core.generate {path}`"),
        ("port_torch.generate", "torch", "python -m core.generate {path}`"),
        ("port_torch.generate", "data", "python -m train_tpu.run --data {path}`"),
        ("port_torch.convert", "mtlm1-export", "is an exported folder already"),
        ("port_torch.import_checkpoint", "mtlm1", "train_tpu.run --init-from` as it is"),
        ("stacking.grow", "mtlm1-export", "python -m port_torch.import_checkpoint {path} CHECKPOINT`"),
        ("train_tpu.replay.__main__", "hf:owner/name", "give the run folder that it comes from"),
        ("train_tpu.run", "mtlm1-export", "python -m port_torch.import_checkpoint {path} CHECKPOINT`"),
        ("port_torch.finetune", "mtlm1", "python -m port_torch.convert {path} FOLDER`"),
        ("port_torch.train", "mtlm1", "python -m port_torch.convert {path} FOLDER`"),
    ],
)
def test_the_right_command_is_named(module: str, given: str, advice: str, tmp_path: Path):
    path, out = Path(given) if given.startswith("hf:") else FIXTURES / given, tmp_path / "out"
    arguments = {
        "train_tpu.replay.__main__": (path, "--step", "0"),
        "port_torch.convert": (path, out),
        "port_torch.import_checkpoint": (path, out),
        "port_torch.finetune": (path, "--data", tmp_path / "no.jsonl", "--out", out),
        "port_torch.train": ("--from", path, "--out", out),
        "train_tpu.run": ("--init-from", path, "--out", out),
    }.get(module, (path,))
    assert re.search(re.escape(advice.format(path=path)), refusal(module, *arguments))
    assert not out.exists()


@pytest.mark.parametrize(
    ("module", "advice"),
    [
        (
            "train_tpu.run",
            "import it first, with `python -m port_torch.import_checkpoint {} CHECKPOINT`",
        ),
        (
            "stacking.grow",
            "import it first, with `python -m port_torch.import_checkpoint {} CHECKPOINT`",
        ),
        ("core.generate", "use `python -m port_torch.generate {}`"),
    ],
)
def test_a_name_on_the_hub_is_of_weights(module: str, advice: str, tmp_path: Path):
    options = ("--init-from",) if module == "train_tpu.run" else ()
    assert refusal(module, *options, "hf:me/tiny").endswith(advice.format("hf:me/tiny"))
    assert "'hf:tiny' is no name on the Hugging Face Hub" in refusal(module, *options, "hf:tiny")


def test_a_finished_run_of_port_torch_is_told_where_its_model_is(finished: Path):
    told = f"whose model is {finished}/model: give that folder"
    assert refusal("port_torch.generate", finished).endswith(told)
    assert refusal("port_torch.train", "--from", finished).endswith(told)


def test_a_model_of_another_step_is_not_the_runs(finished: Path):
    """JAX has continued the run, or it is being continued; or an older checkpoint was given."""
    steps = finished / "checkpoints"
    shutil.copytree(steps / "00000012", steps / "00000018")
    newer = load_manifest(steps / "00000018")
    seal(steps / "00000018", dataclasses.replace(newer, step=18))
    told = f"whose model {finished}/model is of another step: use `python -m core.generate '{finished}'`"
    assert refusal("port_torch.generate", finished).endswith(told)
    assert "whose model is" in refusal("port_torch.generate", steps / "00000012")


def test_adapters_alone_are_no_model(finished: Path):
    step = finished / "checkpoints" / "00000012"
    manifest = load_manifest(step)
    run = manifest.config["run"] | {"lora_rank": 8}
    seal(step, dataclasses.replace(manifest, config=manifest.config | {"run": run}))
    assert kind_of(finished) is kind_of(step) is Kind.ADAPTERS
    quoted = f"'{finished}/model'"
    assert refusal("core.generate", step).endswith(f"use `python -m port_torch.generate {quoted}`")
    assert f"import_checkpoint {quoted} CHECKPOINT" in refusal("stacking.grow", finished)
    for opened in (lambda path: open_model(path, "float32"), evaluated_folder):
        with pytest.raises(UserError, match=r"LoRA run of port_torch, whose model is .*: give that folder"):
            opened(finished)
    shutil.rmtree(finished / "model")
    advice = f"run its command to the end, which writes {finished}/model"
    assert refusal("core.generate", finished).endswith(advice)


def test_a_model_of_another_step_than_its_run_is_said(tmp_path):
    run = shutil.copytree(FIXTURES / "mtlm1", tmp_path / "run")
    assert stale_model(run) is None
    model = shutil.copytree(FIXTURES / "mtlm1-export", run / "model")  # both of step 12
    assert stale_model(run) is None
    seal(model, dataclasses.replace(load_manifest(model, EXPORT_MANIFEST), step=8), EXPORT_MANIFEST)
    assert stale_model(run) == (
        f"{model} is of another step than the newest checkpoint: "
        f"`python -m port_torch.convert {run} {run}-torch` exports that"
    )
