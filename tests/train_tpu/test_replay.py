"""The command train_tpu.replay: updates made again equal the log, planted faults are found by name."""

import hashlib
import json
import os
import re
import shlex
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from core.cache import CACHE
from core.checkpoint.manifest import JAX, load_manifest, seal
from core.checkpoint.steps import list_steps, step_path
from core.data.batches import Batch, record_at
from core.data.prepare import open_or_prepare, prepare
from core.loss import IGNORE
from core.run.engine import Device
from core.run.interrupt import EXIT_SAVED
from core.run.log import read_log
from core.run.steering import Record
from core.run.steering_queue import write_record
from tests.train_tpu.processes import TINY, losses, make_text, refusal_here, run, run_here
from train_tpu.replay.branch import plan_branch
from train_tpu.replay.compiled import why_not_equal
from train_tpu.replay.layers import targets_of
from train_tpu.replay.recorded import Recorded, Start, open_recorded

REPLAY = "train_tpu.replay.__main__"
RUN = (*TINY, "--sample-every", "0")
EQUAL = "equal to the log to the bit"


@pytest.fixture(scope="module")
def made(cache, text):
    """A run with dropout, stopped and resumed, whose guard refused updates; and what it said."""
    folder = cache / "replayed"
    # At such a rate losses jump, and a limit of 0.01 standard deviations refuses many updates.
    arguments = (
        *RUN,
        "--data",
        text,
        "--out",
        folder,
        "--lr",
        "0.5",
        "--sigma",
        "0.01",
        "--halt-after",
        "99",
    )
    first, _ = run_here(*arguments, "--stop-at", "7")
    second, _ = run_here(*arguments)
    return folder, first + second


def contents(folder: Path) -> dict[str, str]:
    """The sha256 of every file."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_the_command_that_the_guard_prints_makes_a_refused_update_again(made):
    folder, said = made
    before = contents(folder)
    commands = re.findall(r"to look into it: python -m train_tpu\.replay (.*)", said)
    refused = [row["step"] for row in read_log(folder, "skip") if row["streak"] == 1]
    assert [shlex.split(typed) for typed in commands] == [
        [str(folder), "--step", str(step)] for step in refused
    ]
    out, _ = run_here(*shlex.split(commands[-1]), module=REPLAY)
    step, loss, norm = losses(folder)[refused[-1]]
    assert f"update {step}: loss {loss!r}, gradient norm {norm!r}" in out
    assert EQUAL in out and "the guard refused it" in out
    assert contents(folder) == before


def test_an_update_is_equal_from_a_checkpoint_and_from_the_start(made):
    """Across the resume, too: it was at step 7, from which no checkpoint is left any more."""
    folder, _ = made
    assert list_steps(folder / "checkpoints") == [3, 6, 9, 12]
    out, _ = run_here(folder, "--step", "8", module=REPLAY)
    assert "from checkpoint 6: 3 updates to make again" in out and f"{EQUAL}, and so are the 2 before" in out
    out, _ = run_here(folder, "--step", "2", module=REPLAY)
    assert "from the start of the run: 3 updates to make again" in out
    assert f"{EQUAL}, and so are the 2 before it" in out


def test_a_log_that_says_something_else_is_compared(made, tmp_path):
    folder = shutil.copytree(made[0], tmp_path / "run")
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        if row["kind"] == "train" and row["step"] == 11:
            row["loss"] *= 1.001
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out, _ = run_here(folder, "--step", "11", module=REPLAY)
    assert EQUAL not in out and "differ by 1.0e-03" in out and "beyond the 2e-05" in out
    assert "equality was to be expected" in out


def test_what_cannot_be_replayed_is_refused(made, text, tmp_path):
    folder, _ = made
    assert "has made updates 0 to 11: --step 12 is not" in refusal_here(folder, "--step", "12", module=REPLAY)
    assert "--step is -1; it must not be" in refusal_here(folder, "--step", "-1", module=REPLAY)
    assert "is not the folder of a run" in refusal_here(tmp_path / "no", "--step", "1", module=REPLAY)
    other = make_text(tmp_path, repeats=59)
    said = refusal_here(folder, "--step", "1", "--data", other, module=REPLAY)
    fingerprint = json.loads((folder / "config.json").read_text())["data"]["fingerprint"]
    assert "has changed" in said and str(other) in said and fingerprint[:12] in said
    said = refusal_here(folder, "--step", "1", "--data", tmp_path / "gone.jsonl", module=REPLAY)
    assert "cannot be opened" in said and "gone.jsonl" in said and fingerprint[:12] in said


def plant(folder: Path, leaf: str, layer: int, value: float) -> None:
    """Writes a value into the middle of a layer's weights in every checkpoint of a run, which stay sealed."""
    for step in list_steps(folder / "checkpoints"):
        step_dir = step_path(folder / "checkpoints", step)
        (file,) = (step_dir / "state").glob(f"params.layers.{leaf.replace('/', '.')}/*0*")
        values = np.fromfile(file, np.float32).reshape(2, -1)
        values[layer, values.shape[1] // 2] = value
        values.tofile(file)
        seal(step_dir, load_manifest(step_dir))


@pytest.mark.parametrize(
    ("leaf", "layer", "value", "found"),
    [
        ("attn/q/kernel", 1, np.inf, "layers/1/attn/q, in concatenate, made of values that were not finite"),
        pytest.param(
            "mlp/up/kernel",
            0,
            3e38,
            "layers/0/mlp/up, in dot_general, made of finite values",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_planted_value_is_found_by_name(made, tmp_path, leaf, layer, value, found):
    folder = shutil.copytree(made[0], tmp_path / "run")
    plant(folder, leaf, layer, value)
    out, _ = run_here(folder, "--step", "11", module=REPLAY)
    assert f"went wrong first: {found}" in out and "the guard refused it" in out
    n = 32 * 32
    planted = f"not finite before the update already: 1 of {n:,} values of layers/{layer}/{leaf}"
    assert (planted in out) == np.isinf(value)
    assert len(re.findall(r"\d+: nan", out)) == 4  # no record has a loss
    rows = dict(re.findall(r"^(embed|layers/\d) +\|[^|]+ ([0-9.]+)% [^|]+\|", out, re.M))
    assert float(rows["embed"]) == 0 < float(rows[f"layers/{layer}"])


@pytest.fixture(scope="module")
def masked(cache, text):
    """A run whose attention ends at documents."""
    run_here(*RUN, "--data", text, "--out", cache / "masked", "--document-mask")
    return cache / "masked", None


@pytest.mark.parametrize("which", ["made", pytest.param("masked", marks=pytest.mark.slow)])
def test_the_layers_have_the_loss_and_gradient_norm_of_the_step(which, request):
    """With dropout; sums are made in another order."""
    made = request.getfixturevalue(which)
    out, _ = run_here(made[0], "--step", "5", module=REPLAY)
    assert EQUAL in out
    loss, norm = re.search(r"layer by layer \(loss (\S+), gradient norm (\S+)\)", out).groups()
    _, logged_loss, logged_norm = losses(made[0])[5]
    np.testing.assert_allclose((float(loss), float(norm)), (logged_loss, logged_norm), rtol=2e-5)
    rows = re.findall(r"^  (\d+: .*)$", out, re.M)
    of_records = dict(pair.split(": ") for row in rows for pair in re.split(r"  +", row))
    assert len(of_records) == 4  # printed with four digits, and the step's loss is their mean
    np.testing.assert_allclose(np.mean([float(x) for x in of_records.values()]), logged_loss, rtol=1e-3)


CONTEXT, RECORDS, BATCH = 32, 2000, 4


def poisoned_data(folder: Path, nonsense: set[int], n: int = RECORDS) -> Path:
    """Prepared data of one document a record, those named being nonsense."""
    rng = np.random.default_rng(0)
    letters = np.array(list("#$%&()*+-/<=>@[]^_{|}~"))

    def text(record: int) -> str:
        if record in nonsense:
            return "".join(rng.choice(letters, CONTEXT - 2))
        return f"{record:06d} comes after {record - 1:06d} in it"[: CONTEXT - 2].ljust(CONTEXT - 2, ".")

    for name, records in (("train", range(n + 1)), ("valid", range(40))):
        rows = "".join(json.dumps({"text": text(record)}) + "\n" for record in records)
        (folder / f"{name}.jsonl").write_text(rows)
    valid = {"valid": str(folder / "valid.jsonl")}
    return prepare([str(folder / "train.jsonl")], folder / "data", "bytes", CONTEXT, valid, workers=1)


def train_on_poison(folder: Path, n: int) -> tuple[Path, str, list[int]]:
    """A run whose update 30 has a batch of nonsense, and update 36 a single such record; what it said, and
    those records."""
    records = [record_at(at, n, seed=0) for at in (*range(30 * BATCH, 31 * BATCH), 36 * BATCH + 2)]
    data = poisoned_data(folder, set(records), n)
    given = ("--steps", "40", "--eval-every", "0", "--save-every", "20", "--sigma", "20")
    out, _ = run_here(*RUN, *given, "--data", data, "--out", folder / "run")
    return folder / "run", out, records


@pytest.mark.slow
def test_nonsense_and_one_poisoned_record_are_named(tmp_path):
    folder, said, records = train_on_poison(tmp_path, RECORDS)
    (typed,) = re.findall(r"step 30: update skipped.*replay (.*)", said)
    out, _ = run_here(*shlex.split(typed), module=REPLAY)
    assert EQUAL in out
    named = re.findall(r"^record (\d+) \(\S+\): '(.*)'$", out, re.M)
    assert {int(record) for record, _ in named} <= set(records[:4]) and len(named) == 3
    out, _ = run_here(folder, "--step", "36", module=REPLAY)
    (record, text), *others = re.findall(r"^record (\d+) \(\S+\): '(.*)'$", out, re.M)
    assert int(record) == records[4] and not set(text) & set("0123456789")
    assert all("comes after" in text for _, text in others)
    lines = [line for line in out.splitlines() if re.match(r"  \d+: ", line)]
    of_records = [float(loss) for loss in re.findall(r": (\S+)", "\n".join(lines))]
    branch = ("--step", "36", "--until", "37", "--without", records[4], "--out", tmp_path / "branch")
    out, _ = run_here(folder, *branch, module=REPLAY)
    row = re.search(r"^ +36 +(\S+) +(\S+) +(\S+)$", out, re.M)
    worst, *rest = of_records
    # Three records are left of four; the table has four digits, the list of the records as many figures.
    assert float(row[2]) == pytest.approx(np.mean(rest), rel=1e-3)
    assert float(row[1]) == pytest.approx(np.mean([worst, *rest]), rel=1e-3)
    (event,) = [row for row in read_log(tmp_path / "branch", "event") if "records" in row]
    assert (event["step"], event["records"]) == (36, [records[4]])


@pytest.mark.slow
def test_one_poisoned_record_of_a_hundred_thousand_is_named(tmp_path):
    folder, _, records = train_on_poison(tmp_path, 100_000)
    out, _ = run_here(folder, "--step", "36", module=REPLAY)
    assert re.search(r"^record (\d+) ", out, re.M)[1] == str(records[4])


def test_a_branch_with_nothing_changed_is_the_run(made, tmp_path):
    folder, out = made[0], tmp_path / "branch"
    before = contents(folder)
    said, _ = run_here(folder, "--step", "7", "--until", "10", "--out", out, module=REPLAY)
    assert "the branch is equal to the run to the bit" in said
    assert losses(out) == losses(folder)[:11] and contents(folder) == before
    manifest = load_manifest(step_path(out / "checkpoints", 11))
    (entry,) = [entry for entry in manifest.lineage if entry["operation"] == "branch"]
    assert (entry["step"], entry["changes"]) == (6, {})
    assert Path(entry["path"]) == step_path(folder / "checkpoints", 6)
    assert (out / "branch.png").read_bytes().startswith(b"\x89PNG")


def test_an_interrupted_branch_is_resumed_by_the_same_command(made, tmp_path):
    """What is compared before says how far the branch came, and counts no update beyond that."""
    folder, out = made[0], tmp_path / "branch"
    arguments = (folder, "--step", "2", "--until", "10", "--out", out)
    said, _ = run_here(
        *arguments, module=REPLAY, expect=EXIT_SAVED, moment="the first update was made",
        then=lambda: os.kill(os.getpid(), signal.SIGINT),
    )  # fmt: skip
    (reached,) = list_steps(out / "checkpoints")
    assert 0 < reached < 10 and "run the same command to resume" in said
    assert f"equal to the run to the bit up to update {reached - 1}, the last that it has made" in said
    refused = sum(row["step"] < reached for row in read_log(folder, "skip"))
    assert f"updates refused by the guard: {refused} in the run, {refused} in the branch" in said
    assert f"{out} exists already" in refusal_here(*arguments, "--lr", "0.5x", module=REPLAY)
    said, _ = run_here(*arguments, module=REPLAY)
    assert f"resuming {out} at step {reached}" in said
    assert said.endswith("branch.png\n") and "the branch is equal to the run to the bit\n" in said
    assert losses(out) == losses(folder)[:11]


@pytest.mark.slow
def test_a_learning_rate_a_hundred_times_too_large_is_seen(made, tmp_path):
    """The run's is 0.5: its stream grows beyond that of a branch with a hundredth of it, whose loss falls."""
    folder, out = made[0], tmp_path / "branch"
    branch = ("--step", "3", "--until", "11", "--lr", "0.01x", "--out", out)
    said, _ = run_here(folder, *branch, module=REPLAY)
    assert "peak lr 0.005 instead of 0.5" in said
    run_loss, branch_loss = re.search(r"mean 8 +(\S+) +(\S+)", said).groups()
    assert float(branch_loss) < float(run_loss) - 0.3
    assert {row["lr"] for row in read_log(out, "train")[4:9]} == {0.005}


@pytest.mark.parametrize(("typed", "rate"), [("0.5x", 0.125), ("2x", 0.5)])
def test_a_factor_of_a_steered_rate_is_of_what_it_was_steered_to(made, tmp_path, typed, rate):
    """The run began with 0.5; its log does not know of the steering, which is read of its record."""
    folder = shutil.copytree(made[0], tmp_path / "steered")
    write_record(folder, [Record(step=3, command="lr=0.5x"), Record(step=9, command="lr=0.01")])
    out = tmp_path / "branch"
    said, _ = run_here(folder, "--step", "8", "--until", "10", "--lr", typed, "--out", out, module=REPLAY)
    assert f"peak lr {rate:g} instead of 0.25" in said
    assert {row["lr"] for row in read_log(out, "train") if 6 <= row["step"] <= 10} == {rate}


def test_a_branch_has_the_length_that_the_run_was_steered_to_later(made, tmp_path):
    """The checkpoint that it begins with does not know of it; its own schedule decays from update 10 on."""
    folder = shutil.copytree(made[0], tmp_path / "lengthened")
    write_record(folder, [Record(step=8, command="steps=40"), Record(step=9, command="steps=30")])
    recorded = open_recorded(folder, 4)
    assert recorded.steps == recorded.config.steps == 30
    branch = plan_branch(recorded, 28, None, (), tmp_path / "branch")
    assert (branch.config.steps, branch.describe()) == (30, "nothing changed")
    assert branch.recorded.settings(11).lr(11) == 0.5
    write_record(folder, [Record(step=4, command="steps=12")])  # what the checkpoint of step 6 knows
    assert open_recorded(folder, 4).steps == 12


@pytest.fixture(scope="module")
def changed(cache, text):
    """A run that resumed with other settings at step 4, whose checkpoint is gone; and what it said."""
    folder = cache / "changed"
    run_here(*RUN, "--keep-every", "3", "--data", text, "--out", folder, "--stop-at", "4")
    other = ("--batch", "8", "--weight-decay", "0.9", "--dropout", "0")
    said, _ = run_here("--out", folder, *other, "--allow-change", "batch", "weight_decay", "dropout")
    assert list_steps(folder / "checkpoints") == [3, 6, 9, 12]
    return folder, said


CHANGED = "--batch 8 (4 before), --dropout 0.0 (0.1 before), --weight-decay 0.9 (0.1 before)"


def without_changes(folder: Path, target: Path, *more_starts: int) -> Path:
    """A copy of a run whose log does not say what changed, as older ones; with more starts of it."""
    folder = shutil.copytree(folder, target)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        row.pop("changed", None)
    (start,) = [row for row in rows if "device" in row and row["step"] == 4]
    rows += [start | {"step": step} for step in more_starts]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_a_resume_says_and_logs_which_settings_it_changes(changed, tmp_path):
    folder, said = changed
    assert f"; from here on with {CHANGED}" in said
    (start, resumed) = [row for row in read_log(folder, "event") if "device" in row]
    assert "changed" not in start and resumed["step"] == 4
    changes = resumed["changed"]["run"]
    assert changes == {"batch": [4, 8], "weight_decay": [0.1, 0.9], "dropout": [0.1, 0.0]}
    folder = shutil.copytree(folder, tmp_path / "back")  # before the change, with the newest settings
    said, _ = run_here("--out", folder, "--from-step", "3", "--stop-at", "4")
    assert f"resuming {folder} at step 3" in said and f"; from here on with {CHANGED}" in said
    said, _ = run_here("--out", folder, "--stop-at", "5")
    *_, resumed = (row for row in read_log(folder, "event") if "device" in row)
    assert "from here on" not in said and resumed["changed"] == {}


@pytest.mark.parametrize("older", [False, True])
def test_an_update_before_a_change_has_the_settings_of_then(changed, tmp_path, older):
    """Where the next checkpoint was saved after it. An older log has one start that can have made it."""
    folder = without_changes(changed[0], tmp_path / "older") if older else changed[0]
    out, _ = run_here(folder, "--step", "3", module=REPLAY)
    assert EQUAL in out and "equality cannot" not in out
    out, _ = run_here(folder, "--step", "7", module=REPLAY)
    assert f"{EQUAL}, and so are the 1 before" in out
    said = refusal_here(folder, "--step", "5", module=REPLAY)
    assert f"changed at step 4, and no checkpoint from there to update 5 is left: {CHANGED}" in said
    assert "replay an update up to 3, or one after a newer checkpoint" in said


def test_a_branch_across_a_change_is_refused(changed, tmp_path):
    folder, out = changed[0], tmp_path / "branch"
    said = refusal_here(folder, "--step", "2", "--until", "5", "--out", out, module=REPLAY)
    assert f"changed at step 4, and a branch has the same ones throughout: {CHANGED}" in said
    assert "--until can go up to 3" in said and not out.exists()
    said, _ = run_here(folder, "--step", "2", "--until", "3", "--out", out, module=REPLAY)
    assert "the branch is equal to the run to the bit" in said


def test_a_change_that_an_older_log_cannot_place_is_said(changed, tmp_path):
    folder = without_changes(changed[0], tmp_path / "older", 5)
    assert list(open_recorded(folder, 7).notes(8)) == []
    assert list(open_recorded(folder, 3).notes(3)) == []
    (note,) = open_recorded(folder, 3).notes(4)
    assert note.startswith("settings changed somewhere between steps 4 and 5, which this older log does")
    assert note.endswith(f"equality cannot be expected: {CHANGED}")
    out, _ = run_here(folder, "--step", "3", module=REPLAY)
    assert EQUAL in out
    said = refusal_here(folder, "--step", "4", module=REPLAY)
    assert "the batch size" in said and "changed after step 3, and its log does not say at which" in said
    assert "changed somewhere between steps 4 and 5" in refusal_here(folder, "--step", "5", module=REPLAY)


def test_limits_and_schedule_that_changed_hold_from_their_step(cache, text):
    """They are inputs of the compiled step, so that a stretch across their change can be made again."""
    folder = cache / "changed-limits"
    noisy = ("--lr", "0.5", "--sigma", "0.01", "--halt-after", "99")
    kept = ("--keep-every", "6")
    run_here(*RUN, *kept, *noisy, "--data", text, "--out", folder, "--stop-at", "8")
    run_here("--out", folder, "--sigma", "99", "--steps", "14", "--allow-change", "sigma", "steps")
    refused = {row["step"] for row in read_log(folder, "skip")}
    assert refused & {6, 7} and not [step for step in refused if step >= 8]
    recorded = open_recorded(folder, 8)
    assert [recorded.settings(step).guard.sigma for step in (6, 7, 8)] == [0.01, 0.01, 99]
    assert [recorded.settings(step).steps for step in (7, 8)] == [12, 14]
    out, _ = run_here(folder, "--step", "8", module=REPLAY)
    assert f"{EQUAL}, and so are the 2 before it" in out
    said = refusal_here(folder, "--step", "7", "--until", "9", "--out", cache / "no", module=REPLAY)
    assert "--until can go up to 7" in said and "--sigma 99.0 (0.01 before)" in said


def unread(folder: Path) -> int:
    """A training record that the updates 3 and 4 do not read: one that the last update does."""
    data = json.loads((folder / "config.json").read_text())["run"]["data"]
    n = open_or_prepare(data, "bytes", CONTEXT, CACHE).splits["train"].windows
    assert n > 48  # in one epoch no record comes twice
    return record_at(47, n, seed=0)


def test_branches_that_cannot_be_are_refused(made, tmp_path):
    folder, _ = made
    step = (folder, "--step", "4")
    for given, said in (
        (("--until", "3"), "--until 3 is out of range: give an update from 4 to 11"),
        (("--until", "12"), "--until 12 is out of range: give an update from 4 to 11"),
        (("--lr", "0.5x"), "--lr is for a branch: give --until M"),
        (("--until", "5", "--lr", "-1x"), "--lr is '-1x'; it must be a positive rate"),
        (("--until", "5", "--lr", "fast"), "--lr is 'fast'; it must be a positive rate"),
        (("--until", "5", "--without", "999999"), "--without 999999: the training records of"),
        (("--until", "5", "--out", tmp_path), f"{tmp_path} exists already"),
        (
            ("--until", "4", "--without", str(unread(folder))),
            "no batch of the updates 3 to 4 holds that record",
        ),
    ):
        assert said in refusal_here(*step, *given, module=REPLAY)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_eight_devices_repeat_themselves_and_one_is_within_the_spread(cache, text):
    """With dropout and two micro-batches."""
    folder = cache / "replayed-on-eight"
    run(cache, *RUN, "--batch", "16", "--grad-accum-steps", "2", "--data", text, "--out", folder, devices=8)
    out, _ = run(cache, folder, "--step", "11", module="train_tpu.replay", devices=8)
    assert EQUAL in out
    out, _ = run(cache, folder, "--step", "11", module="train_tpu.replay", devices=1)
    assert EQUAL in out or "within the 2e-05" in out
    assert EQUAL in out or "8 x cpu made the update, and here are 1 x cpu" in out


@pytest.mark.slow
def test_an_update_is_made_again_on_the_mesh_that_made_it(cache, text):
    """Not on that of the run's last start, with the same number of devices."""
    folder = cache / "replayed-on-meshes"
    command = (*RUN, "--save-every", "4", "--keep-last", "9", "--data", text, "--out", folder)
    run(cache, *command, "--mesh", "data=4", "--stop-at", "6", devices=4)
    run(cache, *command, "--mesh", "tensor=2", "--allow-change", "mesh", "--stop-at", "7", devices=2)
    run(cache, *command, "--mesh", "fsdp=2,tensor=2", "--allow-change", "mesh", devices=4)
    assert [row["mesh"] for row in read_log(folder, "event") if "mesh" in row] == [
        "data=4",
        "tensor=2",
        "fsdp=2,tensor=2",
    ]
    for step, devices in ((5, 4), (6, 2), (7, 4), (11, 4)):
        out, _ = run(cache, folder, "--step", str(step), module="train_tpu.replay", devices=devices)
        assert EQUAL in out, out
    # Of updates 4 to 6 the last was made on two devices, and the others may differ by their rounding.
    out, _ = run(cache, folder, "--step", "6", module="train_tpu.replay", devices=2)
    differs = "not equal on the way there: update" in out
    assert differs == ("4 x cpu made update" in out and "here are 2 x cpu" in out)


def test_the_reason_for_a_difference_is_that_of_the_first_update_to_differ():
    """An update of another mesh, or of another number of devices, on the way to one that was not."""
    starts = [
        Start(0, "cpu", 8, "data=8"),
        Start(2, "cpu", 4, "tensor=4", processes=2),
        Start(4, "cpu", 4, "data=4"),
        Start(6, "cpu", 4, "tensor=4"),
    ]
    recorded = SimpleNamespace(engine=JAX, step=7, start_of=lambda step: Recorded.start_of(run, step))
    run = SimpleNamespace(starts=starts)
    setup = SimpleNamespace(mesh=SimpleNamespace(shape={"data": 1, "fsdp": 1, "tensor": 4}), config=None)
    here = SimpleNamespace(device=Device("cpu", 4))
    said = {step: why_not_equal(recorded, setup, here, step) for step in (1, 3, 5, 7)}
    assert said[1] == "8 x cpu made update 1, and here are 4 x cpu, which sum in another order"
    assert said[3] == "2 processes made update 3, which sum in another order than this one"
    assert said[5] == "--mesh data=4 made update 5, and here is tensor=4, which sums in another order"
    assert said[7].startswith("equality was to be expected")


def test_a_damaged_record_predicts_nothing():
    """Ids are unsigned where they are stored, and the target that is none is not."""
    tokens = np.array([[1, 2, 3], [0, 0, 0]], np.uint16)
    batch = Batch(tokens, 0, np.arange(2), np.array([False, True]))
    assert targets_of(batch).tolist() == [[2, 3], [IGNORE, IGNORE]]
