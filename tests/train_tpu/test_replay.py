"""The command train_tpu.replay: updates made again equal the log, planted faults are found by name."""

import hashlib
import json
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest

from core.checkpoint.manifest import load_manifest, seal
from core.checkpoint.steps import list_steps, step_path
from core.data.dataset import record_at
from core.data.prepare import prepare
from core.run.log import read_log
from tests.train_tpu.processes import TINY, losses, make_text, refusal_here, run, run_here

REPLAY = "train_tpu.replay.__main__"
RUN = (*TINY, "--sample-every", "0", "--grad-accum-steps", "2")
EQUAL = "equal to the log to the bit"


@pytest.fixture(scope="module")
def made(cache, text):
    """A run with dropout and two micro-batches, stopped and resumed, whose guard refused updates; and what it
    said."""
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
        ("mlp/up/kernel", 0, 3e38, "layers/0/mlp/up, in dot_general, made of finite values"),
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
    rows = dict(re.findall(r"^(embed|layers/\d) +\|[^|]+ ([0-9.]+)% [^|]+\|", out, re.M))
    assert float(rows["embed"]) == 0 < float(rows[f"layers/{layer}"])


def test_the_layers_have_the_loss_and_gradient_norm_of_the_step(made):
    """With dropout, from two micro-batches at once: sums in another order."""
    out, _ = run_here(made[0], "--step", "5", module=REPLAY)
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
    given = ("--steps", "40", "--window", "16", "--dropout", "0", "--eval-every", "0", "--sigma", "4")
    out, _ = run_here(*RUN, *given, "--data", data, "--out", folder / "run")
    return folder / "run", out, records


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


@pytest.mark.slow
def test_one_poisoned_record_of_a_hundred_thousand_is_named(tmp_path):
    folder, _, records = train_on_poison(tmp_path, 100_000)
    out, _ = run_here(folder, "--step", "36", module=REPLAY)
    assert re.search(r"^record (\d+) ", out, re.M)[1] == str(records[4])


@pytest.mark.slow
def test_eight_devices_repeat_themselves_and_one_is_within_the_spread(cache, text):
    folder = cache / "replayed-on-eight"
    run(cache, *RUN, "--batch", "16", "--data", text, "--out", folder, devices=8)
    out, _ = run(cache, folder, "--step", "11", module="train_tpu.replay", devices=8)
    assert EQUAL in out
    out, _ = run(cache, folder, "--step", "11", module="train_tpu.replay", devices=1)
    assert EQUAL in out or "within the 2e-05" in out
    assert EQUAL in out or "8 x cpu made the update, and here are 1 x cpu" in out
