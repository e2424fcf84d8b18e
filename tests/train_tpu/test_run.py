"""The command train_tpu.run end to end: what it writes, that it resumes, what it refuses.

In this process; test_faults.py starts it as users do."""

import dataclasses
import functools
import json
import os
import shutil
import signal

import jax
import numpy as np
import pytest

from core.checkpoint.manifest import load_manifest
from core.checkpoint.steps import find_step, list_steps
from core.errors import UserError
from core.run.folder import check_run_folder, run_record, write_config
from core.run.interrupt import EXIT_KEPT
from core.run.log import read_log
from core.run.settings import model_config
from core.tokenizer import load_tokenizer, tokenizer_record
from tests.core.test_tokenizer import bpe_file
from tests.train_tpu.processes import TINY, losses, make_text, refusal, refusal_here, run, run_here, without
from train_tpu import step
from train_tpu.config import RunConfig, defaults
from train_tpu.engine import JaxEngine
from train_tpu.run import parse

UNSAMPLED = (*TINY, "--sample-every", "0")


@pytest.fixture(scope="module")
def finished(cache, text):
    """An uninterrupted run."""
    folder = cache / "finished"
    out, _ = run_here(*TINY, "--data", text, "--out", folder, drawn=True)
    return folder, out


def test_a_run_writes_what_it_promises_and_says_what_to_do_next(finished, cache):
    folder, out = finished
    config = json.loads((folder / "config.json").read_text())
    assert config["model"]["d_model"] == 32 and config["run"]["steps"] == 12
    assert config["run"]["dtype"] == "float32"  # what "auto" stands for on a CPU
    assert [step for step, _, _ in losses(folder)] == list(range(12))
    assert [row["step"] for row in read_log(folder, "eval")] == [0, 5, 10, 12]
    assert (folder / "loss_curve.png").read_bytes().startswith(b"\x89PNG")
    assert list((folder / "tensorboard").iterdir())
    assert "===== step 0 =====" in (folder / "samples.txt").read_text()
    manifest = load_manifest(find_step(folder))
    assert (manifest.step, manifest.sequences, manifest.tokens) == (12, 48, 48 * 32)
    assert manifest.data["cursor"] == 48
    for what in (
        "parameters",
        "attention",
        "xla: the reference",
        "xla: there are no kernels for a CPU",
        "bits per byte",
        "python -m core.generate",
    ):
        assert what in out
    generated, _ = run_here(folder, "--prompt", "Document", "--temperature", "0", module="core.generate")
    assert generated.startswith("Document") and len(generated) > len("Document\n")


def test_the_first_update_waits_for_little_evaluation_and_short_samples(finished):
    """The last evaluation reads all of the held-out text; the first does not, and its samples are short."""
    scored = {row["step"]: row["scored_tokens"] for row in read_log(finished[0], "eval")}
    assert scored[0] == scored[5] == 4 * 32 < scored[12]  # --eval-windows 4
    first = read_log(finished[0], "sample")[0]["texts"][0]
    assert len(first) <= 1 + 16  # the prompt, and 16 of the 31 bytes that the context has room for


def test_held_out_loss_falls(finished):
    rows = read_log(finished[0], "eval")
    assert rows[-1]["bits_per_byte"] < rows[0]["bits_per_byte"] - 0.5


@pytest.mark.slow
def test_evaluations_and_samples_do_not_perturb_training(finished, cache, text):
    folder = cache / "often"
    run_here(*TINY, "--data", text, "--out", folder, "--eval-every", "2", "--sample-every", "5")
    assert losses(folder) == losses(finished[0])


@pytest.mark.slow
def test_a_second_start_takes_the_compiled_step_and_says_how_long_it_took(finished, cache, text):
    folder = cache / "again"
    out, _ = run_here(*UNSAMPLED, "--data", text, "--out", folder, compile_anew=True)
    assert "kept from an earlier start" in out
    assert "the first update was made" in out
    (start,) = [row for row in read_log(folder, "event") if row["what"] == "first update"]
    assert 0 < start["aside"] < start["seconds"]
    assert losses(folder) == losses(finished[0])


def test_the_same_command_resumes_and_a_finished_run_is_left_alone(finished, cache, text):
    folder = cache / "parts"
    arguments = (*UNSAMPLED, "--data", text, "--out", folder)
    # Stopped half-way by a changed total; without a decay the rates are those of the whole run up to its own,
    # which begins at step 10.
    run_here(*arguments, "--steps", "7", "--decay", "0")
    out, _ = run_here(*arguments, "--decay", "0", "--allow-change", "steps")
    assert "resuming" in out and "at step 7" in out
    assert losses(folder)[:11] == losses(finished[0])[:11] and len(losses(folder)) == 12
    out, _ = run_here(*arguments, "--decay", "0")
    assert "has finished" in out


@pytest.mark.slow
def test_one_and_eight_devices_agree(cache, text):
    folders = []
    for devices in (1, 8):
        folder = cache / f"devices-{devices}"
        run(cache, *TINY, "--batch", "8", "--data", text, "--out", folder, devices=devices)
        folders.append(np.array(losses(folder)))
    # Float32 sums in another order differ by about 1e-7 of the value; 12 updates with Adam, whose first ones
    # have the size of the learning rate whatever the gradient's, amplify that by two orders at most.
    np.testing.assert_allclose(folders[0], folders[1], rtol=2e-5)


@pytest.mark.slow
def test_accumulation_equals_the_big_batch(finished, cache, text):
    folder = cache / "accumulated"
    run_here(*UNSAMPLED, "--data", text, "--out", folder, "--grad-accum-steps", "2")
    # The dropout masks are the same, so only the order of sums differs; see the test above.
    np.testing.assert_allclose(np.array(losses(folder)), np.array(losses(finished[0])), rtol=2e-5)


@pytest.mark.slow
def test_the_step_is_compiled_once_whatever_happens(cache, text, caplog):
    """Over a start and a resume with skipped updates, evaluations and a changing learning rate."""
    folder = cache / "compilations"
    # At such a rate losses jump: a limit of 0.01 standard deviations skips many updates.
    noisy = ("--sigma", "0.01", "--lr", "0.5", "--halt-after", "99")
    arguments = (*UNSAMPLED, *noisy, "--data", text, "--out", folder, "--decay", "0")
    for steps, allowed in (("8", ()), ("12", ("--allow-change", "steps"))):
        caplog.clear()
        with jax.log_compiles():
            run_here(*arguments, "--steps", steps, *allowed, compile_anew=True)
        compiled = [line for line in caplog.messages if "Compiling" in line and "train_step" in line]
        assert len(compiled) == 1, compiled
    skips = read_log(folder, "skip")
    assert len(skips) >= 2
    assert len({row["lr"] for row in read_log(folder, "train")}) >= 4
    # A skip names the batch: the records, and the leaves that the gradient's norm came from.
    assert len(skips[0]["records"]) == 4 and skips[0]["sequences"][1] - skips[0]["sequences"][0] == 4
    assert any("layers/" in leaf or "embed" in leaf for leaf in skips[0]["blame"])


@pytest.mark.slow
def test_a_diverged_run_is_halted_with_its_last_good_state(cache, text):
    folder = cache / "diverged"
    arguments = (
        *UNSAMPLED,
        "--data",
        text,
        "--out",
        folder,
        "--lr",
        "1e30",
        "--warmup",
        "0",
        "--halt-after",
        "3",
    )
    out, _ = run_here(*arguments, expect=5)
    assert "halted: 3 updates in a row were not applied" in out
    assert [row["streak"] for row in read_log(folder, "skip")] == [1, 2, 3]
    assert any("nan" in leaf or "inf" in leaf for leaf in read_log(folder, "skip")[0]["blame"])
    out, _ = run_here(folder, "--max-new-tokens", "3", module="core.generate")  # it opens and verifies


@pytest.mark.slow
def test_a_changed_batch_goes_on_at_the_same_sequence(finished, cache, text):
    folder = cache / "batch"
    arguments = (*UNSAMPLED, "--data", text, "--out", folder, "--decay", "0")
    run_here(*arguments, "--steps", "4")
    run_here(*arguments, "--batch", "8", "--steps", "6", "--allow-change", "batch", "steps")
    rows = read_log(folder, "train")
    assert [row["tokens"] // 32 for row in rows] == [0, 4, 8, 12, 16, 24]
    assert load_manifest(find_step(folder)).sequences == 32


def test_init_from_starts_with_the_parameters_alone(finished, cache, text):
    folder = cache / "continued"
    whole = ("--eval-windows", "1000")  # as the last evaluation has it
    run_here(*UNSAMPLED, "--data", text, "--out", folder, "--init-from", finished[0], "--steps", "2", *whole)
    last = read_log(finished[0], "eval")[-1]["nll"]
    first = read_log(folder, "eval")[0]["nll"]
    assert first == last  # the same parameters, data and code
    manifest = load_manifest(find_step(folder))
    assert manifest.lineage[0]["operation"] == "init_from" and manifest.lineage[0]["step"] == 12


def test_a_start_that_ends_before_its_first_update_does_not_bind_the_next(text, tmp_path, monkeypatch):
    """It does not fit into memory, or is stopped while it compiles; the next one has other settings."""
    folder = tmp_path / "runs" / "base"
    arguments = (*UNSAMPLED, "--data", text, "--out", folder)

    def full(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")

    for place, name in ((step, "compile_step"), (JaxEngine, "_run_step")):
        with monkeypatch.context() as patch:
            patch.setattr(place, name, full)
            assert "try --grad-accum-steps 2" in refusal_here(*arguments)
        assert not list(tmp_path.iterdir())
    interrupt = functools.partial(os.kill, os.getpid(), signal.SIGINT)
    run_here(*arguments, "--lr", "0.5", moment="compiled the step", then=interrupt, expect=EXIT_KEPT)
    run_here(*arguments, "--lr", "0.5", moment="step 0: valid", then=interrupt, expect=EXIT_KEPT)
    assert [row["step"] for row in read_log(folder, "eval")] == [0]
    out, _ = run_here(*arguments, "--stop-at", "1")
    assert out.count("ended before its first update: this one replaces it") == 1 and "starting a new" in out
    assert [row["step"] for row in read_log(folder, "eval")] == [0, 1]
    assert "--lr 0.01, not 0.5" in refusal_here(*arguments, "--lr", "0.5")


def test_refusals(finished, cache, text, tmp_path):
    folder = finished[0]
    tiny = (*UNSAMPLED, "--data", text, "--out", tmp_path / "new")
    assert "did you mean 'mtlm1-tiny'" in refusal_here("--preset", "mtlm1-tinny")
    assert "nowhere.txt" in refusal_here(*UNSAMPLED, "--data", "nowhere.txt", "--out", tmp_path / "new")
    (tmp_path / "empty.txt").write_text("")
    assert "empty" in refusal_here(*UNSAMPLED, "--data", tmp_path / "empty.txt", "--out", tmp_path / "new")
    message = refusal_here(*UNSAMPLED, "--data", text, "--out", folder, "--lr", "0.5")
    assert "--lr 0.01, not 0.5" in message and "--allow-change lr" in message
    assert "--n-layers 2, not 3" in refusal_here(
        *UNSAMPLED, "--data", text, "--out", folder, "--n-layers", "3"
    )
    fewer = ("--steps", "5", "--allow-change", "steps")
    assert "is at step 12 already" in refusal_here(*UNSAMPLED, "--data", text, "--out", folder, *fewer)
    other = make_text(tmp_path, repeats=50)
    assert "--allow-change data" in refusal_here(*UNSAMPLED, "--data", other, "--out", folder)
    assert "not an MTLM run" in refusal_here(*UNSAMPLED, "--data", text, "--out", text.parent)
    assert "cannot be used" in refusal_here(*tiny, "--attention", "cudnn")
    said = refusal_here(*tiny, "--kernels", "cuda")
    assert "--kernels cuda cannot be used: there are no kernels for a CPU; --kernels auto trains" in said
    assert "no checkpoint in" in refusal_here(*tiny, "--init-from", tmp_path)
    assert "not both" in refusal_here(*tiny, "--epochs", "1")
    assert "fewer than one batch" in refusal_here(
        *without(tiny, "--steps"), "--batch", "8000", "--epochs", "1"
    )
    assert not (tmp_path / "new" / "checkpoints").exists()


@pytest.mark.slow
def test_a_batch_that_eight_devices_cannot_share_is_refused(cache, text, tmp_path):
    arguments = (*TINY, "--data", text, "--out", tmp_path / "new", "--batch", "12")
    assert "not divisible by 8 devices" in refusal(cache, *arguments, devices=8)


def test_a_tokenizer_that_does_not_match_is_refused(finished, cache, text, tmp_path):
    prepared = tmp_path / "prepared"
    run_here(text, "--tokenizer", "bytes", "--context", "32", "--out", prepared, module="train_tpu.prepare")
    arguments = without(TINY, "--tokenizer")
    message = refusal_here(
        *arguments, "--tokenizer", "mistral", "--data", prepared, "--out", tmp_path / "new"
    )
    assert "mistral" in message and "bytes" in message
    message = refusal_here(*arguments, "--data", text, "--tokenizer", "mistral", "--out", finished[0])
    assert "mistral" in message and "bytes" in message
    message = refusal_here(*TINY, "--context", "16", "--data", prepared, "--out", tmp_path / "new")
    assert "16" in message and "32" in message


@pytest.mark.slow
def test_out_alone_resumes_a_run_as_it_is(finished, cache, text):
    """A trunk stopped half-way, the steps named that are to be kept, and the rest by --out alone."""
    folder = cache / "trunk"
    kept = ("--keep-steps", "2", "5", "--keep-last", "1", "--save-every", "100")
    out, _ = run_here(*UNSAMPLED, "--data", text, "--out", folder, "--stop-at", "7", *kept)
    assert list_steps(folder / "checkpoints") == [2, 5, 7]
    assert "python -m stacking.grow" in out and "--schedule restart" not in out
    again, _ = run_here("--out", folder, "--stop-at", "7")
    assert "is already at step 7 (--stop-at 7): drop --stop-at to continue" in again
    out, _ = run_here(f"--out={folder}")
    assert "resuming" in out and "--schedule restart" in out
    assert losses(folder) == losses(finished[0])
    assert list_steps(folder / "checkpoints") == [2, 5, 12]


@pytest.mark.slow
def test_settings_younger_than_a_run_have_their_defaults(finished, text, tmp_path):
    folder = tmp_path / "older"
    shutil.copytree(finished[0], folder)
    path = folder / "config.json"
    record = json.loads(path.read_text())
    for name in ("rewarm", "rewarm_at", "schedule_start", "keep_steps", "stop_at"):
        del record["run"][name]
    del record["sha256"]  # older runs are not sealed
    path.write_text(json.dumps(record))
    out, _ = run_here(*TINY, "--data", text, "--out", folder)
    assert "resuming" in out and "has finished" in out
    path.write_text("{")
    assert "config.json is damaged" in refusal_here("--out", folder)


def test_the_runs_own_copy_of_the_tokenizer_is_used_unless_another_is_typed(tmp_path):
    file, folder = bpe_file(tmp_path, ["<s>", "</s>"]), tmp_path / "run"
    folder.mkdir()
    tokenizer = load_tokenizer(file)
    config = defaults("mtlm1-tiny")
    config = dataclasses.replace(config, tokenizer=str(file), data=str(tmp_path / "data"))
    model = model_config(config, tokenizer.vocab_size)
    recorded = tokenizer_record(tokenizer), {"fingerprint": "f" * 64}
    write_config(folder, run_record(config, model, 5, *recorded))
    given = ["--out", str(folder)]
    assert parse(given).tokenizer == str(file)  # a run of an older version, which carries none
    tokenizer.carry(folder)
    own = str(folder / "tokenizer.json")
    file.write_text("changed since")
    assert parse(given).tokenizer == own
    assert parse([*given, "--tokenizer", str(file)]).tokenizer == str(file)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=rf"the run in {folder} is not found.*--tokenizer FILE"):
        parse(given)
    file.unlink()
    assert parse([*given, "--tokenizer", "new.json"]).tokenizer == "new.json"
    # The name of the file is not a setting of the run; its hash is compared instead.
    check_run_folder(
        folder,
        run_record(dataclasses.replace(config, tokenizer=own), model, 5, *recorded),
        (),
        RunConfig(),
    )


@pytest.mark.slow
def test_a_deleted_tokenizer_is_not_missed(cache, text, tmp_path):
    file, folder = bpe_file(tmp_path, ["<s>", "</s>"]), tmp_path / "run"
    arguments = (*without(TINY, "--tokenizer"), "--tokenizer", file, "--data", text, "--out", folder)
    run_here(*arguments, "--stop-at", "3")
    file.unlink()
    out, _ = run_here("--out", folder)
    assert "resuming" in out and "at step 3" in out
    generated, _ = run_here(folder, "--prompt", "the cat", module="core.generate")
    assert generated.startswith("the cat")
    grown = tmp_path / "grown"
    command = (folder, "--out", grown, "--steps", "14", "--schedule", "restart")
    out, _ = run_here(*command, module="stacking.grow")
    assert "the next sequence of the run's data" in out
    assert (grown / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
