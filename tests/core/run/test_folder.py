"""Under which settings a run folder is resumed; no process is started."""

import contextlib
import dataclasses
import functools
import hashlib
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from jax.experimental import multihost_utils
from rich.console import Console

from core import processes
from core.checkpoint.manifest import Manifest, load_manifest
from core.checkpoint.steps import find_step, step_path
from core.config import ModelConfig, preset
from core.errors import UserError
from core.run.folder import (
    check_run_folder,
    hold_folder,
    read_config,
    require_folder,
    run_record,
    settings_of_run,
    write_config,
)
from core.run.rates import peak_rate, with_rate
from core.run.settings import (
    ModelOverrides,
    check_records,
    flatten,
    given_value,
    model_config,
    require_same,
    unflatten,
)
from core.run.training_run import TrainingRun
from core.sharding import make_mesh, resolved_mesh
from tests.several_devices import ROOT
from train_tpu import run as command
from train_tpu import setup as preparing
from train_tpu import trainer
from train_tpu.backend import choose_step
from train_tpu.config import RunConfig, defaults

TOKENIZER = {"name": "bytes", "sha256": "0" * 64, "vocab_size": 258}


def record(**changes) -> dict:
    """What a start with these settings records."""
    steps = changes.pop("steps", 350)
    overrides = ModelOverrides(**changes.pop("model", {}))
    config = dataclasses.replace(defaults("mtlm1-tiny"), model=overrides)
    optim = {"lr": 1e-2} | {k: changes.pop(k) for k in list(changes) if hasattr(config.optim, k)}
    config = dataclasses.replace(config, optim=dataclasses.replace(config.optim, **optim), **changes)
    return run_record(config, model_config(config, 258), steps, TOKENIZER, {"fingerprint": "f" * 64})


def make_run(folder: Path, step: int, **changes) -> Path:
    """A run folder with a checkpoint, without the arrays."""
    (folder / "checkpoints").mkdir(parents=True)
    saved = record(**changes)
    write_config(folder, saved)
    manifest = Manifest(
        kind="train", step=step, sequences=0, tokens=0, config={k: saved[k] for k in ("model", "run")},
        tokenizer=TOKENIZER,
    )  # fmt: skip
    where = step_path(folder / "checkpoints", step)
    where.mkdir()
    (where / "manifest.json").write_text(manifest.to_json())
    return folder


def resumed(folder: Path, *allowed: str, devices: int = 1, **changes) -> None:
    mesh = functools.partial(resolved_mesh, n_devices=devices)
    check_run_folder(folder, record(**changes), allowed, RunConfig(), mesh)


def test_more_steps_after_a_decay_are_refused_whatever_is_allowed(tmp_path):
    folder = make_run(tmp_path / "a", 350)
    for allowed in ((), ("steps",)):
        with pytest.raises(UserError, match=r"would jump at step 350 from 0.0143 to 1.*--schedule-start 350"):
            resumed(folder, *allowed, steps=700)
    resumed(folder, "steps", "schedule_start", steps=700, schedule_start=350)
    resumed(folder)


def test_a_damaged_checkpoint_is_left_to_those_who_open_it_or_fall_back(tmp_path):
    folder = make_run(tmp_path / "a", 350)
    (step_path(folder / "checkpoints", 350) / "manifest.json").write_text("{")
    resumed(folder)


def test_more_steps_before_the_decay_are_a_change_by_name(tmp_path):
    folder = make_run(tmp_path / "a", 175)
    with pytest.raises(UserError, match=r"--steps 350, not 700: .*--allow-change steps"):
        resumed(folder, steps=700)
    resumed(folder, "steps", steps=700)


def test_a_setting_that_only_one_version_has_is_compared():
    """A later one's has no value here; what an older record lacks had the default of today."""
    now = flatten(RunConfig())

    def resume(old: dict, **changes) -> None:
        require_same(old, now | changes, (), Path("runs/a"), RunConfig())

    older = {name: value for name, value in now.items() if name != "document_mask"}
    resume(older)
    with pytest.raises(UserError, match="--document-mask False, not True"):
        resume(older, document_mask=True)
    with pytest.raises(UserError, match="--of-later 3, not None"):
        resume(now | {"of_later": 3})


def test_what_0_turns_off_may_be_0():
    config = RunConfig(eval_every=0, sample_every=0, from_step=0, watch_every=0)
    assert (config.eval_every, config.sample_every) == (0, 0)


def test_a_value_is_found_before_the_command_line_is_parsed():
    """The last one holds, with a space or =; a value may have a = of its own."""
    words = ["--preset", "a", "--data", "b=c", "--preset=d", "--tokenizer=e=f"]
    found = {flag: given_value(words, flag) for flag in ("--preset", "--data", "--tokenizer", "--out")}
    assert found == {"--preset": "d", "--data": "b=c", "--tokenizer": "e=f", "--out": None}


@pytest.mark.parametrize(
    ("given", "why"),
    [({"from_step": 3, "fallback": True}, "--from-step or --fallback, not both"),
     ({"steps": 3, "epochs": 1.0}, "--steps or --epochs, not both")],
)  # fmt: skip
def test_settings_that_contradict_each_other_are_refused(given: dict, why: str):
    with pytest.raises(UserError, match=why):
        RunConfig(**given)


@pytest.mark.parametrize(("record", "is_one"), [
    (0, True), (-1, False), ("wiki:0", True), ("wiki:-1", False), ("wiki", False), ("5", False),
])  # fmt: skip
def test_a_record_is_a_number_or_that_of_a_source(record: int | str, is_one: bool):
    with contextlib.nullcontext() if is_one else pytest.raises(UserError, match=f"--leave-out.* {record}"):
        check_records(leave_out=(record,))


def test_one_mesh_written_in_two_ways_is_one(tmp_path):
    folder = make_run(tmp_path / "a", 10)
    resumed(folder, devices=8, mesh="data=8")
    with pytest.raises(UserError, match="--mesh data=8, not fsdp=8"):
        resumed(folder, devices=8, mesh="fsdp=8")
    named = make_run(tmp_path / "b", 10, mesh="data=2,fsdp=4")
    resumed(named, devices=8, mesh="fsdp=4,data=2")
    resumed(named, devices=8, mesh="fsdp=4, data=2, tensor=1")


def test_a_type_is_recorded_as_what_it_stands_for(tmp_path):
    folder = make_run(tmp_path / "a", 10, dtype="bfloat16")
    with pytest.raises(UserError, match=r"--dtype bfloat16, not float32: .*--allow-change dtype"):
        resumed(folder, dtype="float32")
    resumed(folder, "dtype", dtype="float32")
    older = make_run(tmp_path / "b", 10, dtype="auto")
    resumed(older, dtype="float32")
    resumed(older, dtype="bfloat16")


def test_a_run_that_named_its_settings_otherwise_resumes(tmp_path):
    folder = make_run(tmp_path / "a", 10, grad_accum_steps=2)
    path = folder / "config.json"
    older = json.loads(path.read_text())
    older["run"]["accumulate"] = older["run"].pop("grad_accum_steps")
    del older["sha256"]
    path.write_text(json.dumps(older))
    assert unflatten(older["run"], RunConfig).grad_accum_steps == 2
    resumed(folder, grad_accum_steps=2)
    with pytest.raises(UserError, match="--grad-accum-steps 2, not 4"):
        resumed(folder, grad_accum_steps=4)


def test_an_override_that_is_the_presets_value_is_none(tmp_path):
    folder = make_run(tmp_path / "a", 10)
    resumed(folder, model={"n_layers": 6, "dropout": 0.0})
    with pytest.raises(UserError, match="--n-layers 6, not 4"):
        resumed(folder, model={"n_layers": 4})
    resumed(make_run(tmp_path / "b", 10, model={"n_layers": 6}))


def test_a_mesh_of_other_devices_is_told_with_the_flags_that_help(tmp_path):
    """As a run has it that was grown from one on 8 devices: its user never wrote --mesh."""
    folder = make_run(tmp_path / "a", 10, mesh="data=8")
    config = command.parse(["--out", str(folder)])
    assert config.mesh == "data=8"
    with pytest.raises(
        UserError,
        match=r"is for --mesh data=8, but there .* give --mesh data=1 --allow-change mesh",
    ):
        preparing.mesh_shape(config, folder)
    config = command.parse(["--out", str(folder), "--mesh", "data=1", "--allow-change", "mesh"])
    assert preparing.mesh_shape(config, folder) == (1, 1, 1)
    resumed(folder, "mesh", mesh="data=1")
    with pytest.raises(UserError, match="--mesh fsdp=4 needs 4 devices"):
        preparing.mesh_shape(command.parse(["--out", str(folder), "--mesh", "fsdp=4"]), folder)


def test_where_no_run_can_be_is_told_before_anything_is_made(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").write_text("x")
    for out, says in (
        ("file", "is a file"), ("file/below", "which is a file"), ("other", "not empty and not an MTLM run")
    ):  # fmt: skip
        with pytest.raises(UserError, match=says):
            require_folder(tmp_path / out)
    require_folder(tmp_path / "new" / "run")
    require_folder(make_run(tmp_path / "run", 1))
    assert not (tmp_path / "new").exists()


def test_a_rate_that_was_derived_is_derived_again_before_the_first_update(tmp_path):
    """For another length or optimizer; one that was given stays, and so does that of a run that has begun."""
    config, model = defaults("mtlm2-40m"), preset("mtlm2-40m")
    derived = peak_rate("mtlm2-40m", "muon", model, config.batch, 496)
    for lr, found in ((derived, None), (2e-3, 2e-3)):
        folder = tmp_path / str(lr)
        config = dataclasses.replace(config, optim=dataclasses.replace(config.optim, lr=lr))
        folder.mkdir()
        write_config(folder, run_record(config, model, 496, TOKENIZER, {"fingerprint": "f" * 64}))
        assert command.parse(["--out", str(folder)]).optim.lr == found
        (folder / "checkpoints" / "00000005").mkdir(parents=True)
        assert command.parse(["--out", str(folder)]).optim.lr == lr


@pytest.mark.parametrize("name", ["mtlm2-40m", "mtlm2-tiny"])
@pytest.mark.parametrize("optimizers", [("muon", "adamw"), ("adamw", "muon")])
def test_a_start_with_another_optimizer_has_its_rate(name: str, optimizers: tuple[str, str], tmp_path):
    """Before the first update, whether or not the rate of one or of both follows a rule."""
    model, (before, now) = preset(name), optimizers

    def without_lr(optimizer: str) -> RunConfig:
        config = dataclasses.replace(defaults(name), steps=500, epochs=None)
        optim = dataclasses.replace(config.optim, optimizer=optimizer, lr=None)
        return with_rate(dataclasses.replace(config, optim=optim), model, 500)[0]

    record = run_record(without_lr(before), model, 500, TOKENIZER, {"fingerprint": "f" * 64})
    write_config(tmp_path, record)
    asked = command.parse(["--out", str(tmp_path), "--optimizer", now])
    found = with_rate(asked, model, 500)[0].optim
    assert (found.optimizer, found.lr) == (now, without_lr(now).optim.lr)


@pytest.mark.parametrize(
    ("argv", "values"),
    [
        (
            ["--preset", "mtlm2-40m"],
            {"n_layers": 11, "biases": True, "epochs": 2.0, "steps": None, "lr": 5.6e-3},
        ),
        (["--preset", "mtlm1-88m"], {"n_layers": 12, "epochs": 1.0, "batch": 64, "lr": 1.7e-3, "decay": 0.4}),
        (["--preset", "mtlm1-200m"], {"n_layers": 24, "context": 1024, "lr": 1.7e-3}),
        ([], {"n_layers": 6, "steps": 350, "norm_eps": 1e-6, "scaled_residual_init": False}),
    ],
)
def test_help_shows_the_presets_values(argv, values, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        command.parse([*argv, "--help-all"])
    said = capsys.readouterr().out
    entries = re.split(r"^[│ ]{1,3}(?=--?\w)", said, flags=re.MULTILINE)
    for name, value in values.items():
        (entry,) = (text for text in entries if text.startswith(f"--{name.replace('_', '-')} "))
        shown = re.search(r"\(default:\W+([^)\s]+)\)", entry)
        assert (shown and shown[1]) == (None if value is None else str(value)), entry
    assert "(default: None)" not in said
    # Only the help: a setting that is not given stays so.
    assert command.parse(argv).model == ModelOverrides() and command.parse(argv).steps is None


def test_help_of_a_run_shows_the_runs_own_values(tmp_path, capsys):
    folder = make_run(tmp_path / "a", 10, steps=77, model={"n_layers": 3})
    with pytest.raises(SystemExit):
        command.parse(["--out", str(folder), "--help"])
    said = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "Transformer layers. (default: 3)" in said and "(default: 77)" in said


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--prompts", "x" * 300), "prompt.* tokens long"),
        (("--out", "file"), "is a file: name another folder"),
        (("--d-model", "33"), "model.d_model 33 is not divisible"),
        (("--mesh", "data=3"), "needs 3 devices"),
    ],
)
def test_what_cannot_be_is_refused_before_the_data_is_prepared(arguments, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("x")
    monkeypatch.setattr(preparing, "keep_compiled", lambda: None)
    monkeypatch.setattr(preparing, "open_data", lambda *_: pytest.fail("the data was prepared"))
    monkeypatch.setattr(command.sys, "argv", ["run", "--data", "nowhere", *arguments])
    with pytest.raises(UserError, match=says):
        command.main()
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_processes_that_would_resume_from_other_states_are_refused(monkeypatch):
    """The first sees no checkpoint and this one that of step 12, as on a shared disk that lags. Both would
    compile, and then wait for each other for ever."""
    run = ROOT / "tests/fixtures/7b5e0bc/mtlm1"
    saved = load_manifest(find_step(run))
    first = np.frombuffer(hashlib.sha256(b"").digest(), np.uint8)
    monkeypatch.setattr(processes, "are_several", lambda: True)
    monkeypatch.setattr(processes, "in_turn", lambda action: action())
    monkeypatch.setattr(multihost_utils, "process_allgather", lambda mine: np.stack([first, mine]))
    config = dataclasses.replace(unflatten(saved.config["run"], RunConfig), attention="xla")
    mesh = make_mesh()
    step, _ = choose_step(config, ModelConfig(**saved.config["model"]), mesh)
    setup = TrainingRun()
    record = {**saved.config, "tokenizer": saved.tokenizer, "data": saved.data}
    vars(setup).update(
        config=config, out=run, record=record, mesh=mesh, step=step, console=Console(quiet=True)
    )
    with pytest.raises(UserError, match=r"^processes \[1\] have different checkpoints in .* from process 0"):
        trainer.starting_state(setup)


def test_a_run_that_lost_its_config_json_keeps_its_settings(tmp_path: Path):
    """Else it would be resumed under the defaults, and nothing be compared with what it was started with."""
    torch = shutil.copytree(ROOT / "tests" / "fixtures" / "7b5e0bc" / "torch", tmp_path / "torch")
    said, before = [], read_config(torch)
    (torch / "config.json").unlink()
    assert read_config(torch) == before
    with hold_folder(torch, said.append):
        assert "config.json is missing: the settings are those that the newest checkpoint" in said[0]
    default = RunConfig()
    assert settings_of_run(torch, default, []).batch == before["run"]["batch"] != default.batch


def test_a_models_folder_is_not_a_damaged_run():
    with pytest.raises(UserError, match=r"is a folder of weights for PyTorch, and not an MTLM run"):
        read_config(ROOT / "tests" / "fixtures" / "7b5e0bc" / "mtlm1-export")
