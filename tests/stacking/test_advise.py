"""`python -m stacking.advise`: its arithmetic, its refusals, what it keeps, and a whole one in the small."""

import dataclasses
import hashlib
import json
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from core.checkpoint.manifest import load_manifest, recorded_hash
from core.checkpoint.steps import find_step, list_steps, step_path
from core.errors import UserError
from core.run.log import read_log
from stacking.advise.config import AdviseConfig
from stacking.advise.question import equal_flops
from stacking.advise.verdict import Estimate, decide, estimate, keep_advice, read_advice
from stacking.grow import GrowConfig
from stacking.growth import decide as decide_growth
from tests.train_tpu.processes import (
    TINY,
    losses,
    make_text,
    refusal_here,
    run,
    run_here,
    sentence,
    start,
    without,
)

MODULE = "stacking.advise.__main__"
FIXTURES = Path(__file__).parents[1] / "fixtures" / "7b5e0bc"


def test_the_standard_error_is_that_of_a_ratio_of_sums():
    # 12 nats over 4 tokens; residuals -1, 0 and 1; sqrt(3 / 2 * 2) / 4.
    found = estimate(np.array([2.0, 3.0, 7.0]), np.array([1, 1, 2]))
    assert found == (3.0, pytest.approx(3**0.5 / 4, rel=1e-15))
    # Windows of one length: the textbook's standard error of a mean.
    means = np.array([0.3, 0.1, 0.4, 0.15, 0.9])
    found = estimate(10 * means, np.full(5, 10))
    assert found.mean == pytest.approx(means.mean(), rel=1e-15)
    assert found.error == pytest.approx(means.std(ddof=1) / 5**0.5, rel=1e-14)


def test_a_difference_counts_beyond_two_standard_errors():
    answers = {
        -0.0201: "grow now", 0.0201: "train on", -0.0199: "no difference measured",
        0.0199: "no difference measured",
    }  # fmt: skip
    assert {mean: decide(Estimate(mean, 0.01)) for mean in answers} == answers
    assert decide(Estimate(0.0, 0.0)) == "no difference measured"


@pytest.mark.parametrize("small, large", [(100, 200), (100, 187), (97, 101), (3, 10)])
def test_both_arms_cost_the_same_and_no_more_than_the_budget(small, large):
    for updates in (16.0, 33.4, 100.0, 1234.9):
        train_on, grow = equal_flops(updates, small, large)
        assert grow * large <= updates * small < (grow + 1) * large
        assert abs(train_on * small - grow * large) <= small / 2


@pytest.mark.parametrize("budget", ["0", "0%", "-5", "2e6", "20 %", "1.5", "nan%", "half", ""])
def test_a_budget_is_a_number_of_tokens_or_a_share(budget):
    assert AdviseConfig(Path("x"), budget="12.5%").tokens(8000) == 1000
    assert AdviseConfig(Path("x"), budget="300").tokens(8000) == 300
    with pytest.raises(UserError, match="--budget"):
        AdviseConfig(Path("x"), budget=budget)


@pytest.fixture
def trunk(tmp_path, monkeypatch):
    """A run of 12 updates of 16, 256 tokens each; its decay begins at step 13. Its data is where it was."""
    monkeypatch.chdir(FIXTURES)
    shutil.copytree(FIXTURES / "mtlm1", tmp_path / "run")
    return tmp_path / "run"


def change(step_dir: Path, **settings) -> None:
    """Other settings in a checkpoint's manifest; `step` is a field of its own."""
    manifest = load_manifest(step_dir)
    step = settings.pop("step", manifest.step)
    run_of_it = manifest.config["run"] | settings
    changed = dataclasses.replace(manifest, step=step, config=manifest.config | {"run": run_of_it})
    (step_dir / "manifest.json").write_text(changed.to_json())


def refused(trunk: Path, *arguments) -> str:
    before = sorted(trunk.parent.rglob("*"))
    _, said = run_here(trunk, *arguments, module=MODULE, expect=2)
    assert sorted(trunk.parent.rglob("*")) == before
    # Opening data of an older version may say something before.
    return sentence(said.strip().splitlines()[-1])


ENOUGH = ("--budget", "200%")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--at", "5"), "has no checkpoint 5: it has 12"),
        (("--at", "last"), "--at last is not a step"),
        (
            ("--budget", "100%"),
            "is 3,072 tokens at step 12, which leaves the grown model 6 updates, and it needs",
        ),
        ((*ENOUGH, "--factor", "1"), "makes 2 layers of 2, which is no growth"),
        ((*ENOUGH, "--layers", "0-1"), "makes 2 layers of 2, which is no growth"),
        ((*ENOUGH, "--layers", "0-2"), "names layer 2"),
        (("--budget", "9999", "--windows", "7"), "--windows is 7; it must be at least 8"),
        (("--budget", "9999", "--heldout", "books"), "--heldout books: data holds out valid"),
        (("--budget", "9999"), "the held-out set valid of data has 7 windows, and a standard error needs 8"),
        (("--out", FIXTURES), "is not empty and not a folder of stacking.advise"),
        (("--out", FIXTURES / "text.txt"), "is a file"),
    ],
)
def test_what_cannot_be_answered_is_refused(trunk, arguments, message):
    assert message in refused(trunk, *arguments)


@pytest.mark.parametrize(
    "settings, why",
    [
        ({"schedule": "cosine"}, "its schedule is cosine"),
        ({"steps": 14}, "it decays from step 11 on"),
        ({"warmup": 13}, "it is warmed up until step 13"),
        ({"rewarm": 4, "rewarm_at": 10}, "it is warmed up until step 14"),
    ],
)
def test_a_rate_that_is_not_constant_is_refused(trunk, settings, why):
    change(find_step(trunk), **settings)
    said = refused(trunk)
    assert f"is not constant at step 12: {why}" in said and "--keep-steps" in said


def test_the_steps_at_which_it_can_be_asked_are_named(trunk):
    later = step_path(trunk / "checkpoints", 14)
    shutil.copytree(find_step(trunk), later)
    change(later, step=14)
    assert "at step 14: it decays from step 13 on; it is at 12: give --at 12" in refused(trunk)


def test_a_run_that_is_to_leave_out_updates_is_refused(trunk):
    step_dir = find_step(trunk)
    manifest = dataclasses.replace(load_manifest(step_dir), steering=[{"step": 5, "command": "skip=11:15"}])
    (step_dir / "manifest.json").write_text(manifest.to_json())
    assert "after step 12 are to be left out (skip=, up to 15)" in refused(trunk)


def test_the_least_budget_that_is_named_is_enough(trunk):
    least = refused(trunk).rpartition(" ")[2]
    assert "has 7 windows" in refused(trunk, "--budget", least)
    assert "it needs 16" in refused(trunk, "--budget", str(int(least) - 4 * 64))


def test_other_folders_are_refused(trunk):
    assert "is not the folder of a run (it has no config.json)" in refused(find_step(trunk))
    assert "does not exist" in refused(trunk / "nowhere") or "is not the folder of a run" in refused(
        trunk / "no"
    )
    assert "port_torch.import_checkpoint" in refusal_here(FIXTURES / "mtlm1-export", module=MODULE)


def test_data_that_has_changed_is_refused(trunk, monkeypatch):
    step_dir = find_step(trunk)
    manifest = load_manifest(step_dir)
    other = dataclasses.replace(manifest, data=manifest.data | {"fingerprint": "0" * 64})
    (step_dir / "manifest.json").write_text(other.to_json())
    assert "data is no longer what checkpoint 12" in refused(trunk, *("--budget", "9999"))


def test_a_dry_run_says_what_a_start_would_be_refused_for(trunk, monkeypatch):
    """After the cost, which it was asked for; and it writes nothing."""
    arguments = (trunk, "--budget", "9999", "--dry-run")
    said, _ = run_here(*arguments, module=MODULE)
    assert "note: without --dry-run this would be refused now: the held-out set valid of data has 7" in said
    monkeypatch.chdir(trunk.parent)
    said, _ = run_here(*arguments, module=MODULE)
    refusal = refused(trunk, "--budget", "9999").removeprefix("error: ")
    note = f"note: without --dry-run this would be refused now: {refusal}"
    assert said.splitlines()[-2:] == [f"dry run: {trunk}-advice was not written", note]
    assert not (trunk.parent / "run-advice").exists()


def test_an_output_folder_is_of_one_question(trunk, tmp_path):
    out = tmp_path / "run-advice"
    out.mkdir()
    (out / "question.json").write_text(
        json.dumps({"op": "stack", "factor": None, "layers": None, "budget": "9999"})
    )
    assert "was begun with --budget 9999, not --budget 20%: give the same again" in refused(trunk)
    assert "was begun without --factor 3" in refused(trunk, "--budget", "9999", "--factor", "3").replace(
        ".0", ""
    )
    (out / "question.json").write_text("{")
    assert "question.json is damaged" in refused(trunk)


def entry(step_dir: Path, **more) -> dict:
    kept = {
        "checkpoint": recorded_hash(step_dir),
        "layers": [2, 4],
        "sources": [0, 1, 0, 1],
        "how": ["copy"] * 4,
    }
    return kept | {"budget": "20%", "heldout": "valid", "advice": "grow now"} | more


def test_what_grows_there_has_the_advice_in_its_lineage(trunk, tmp_path):
    step_dir = find_step(trunk)
    growing = GrowConfig(step_dir, out=tmp_path / "grown")
    assert "advice" not in decide_growth(growing).lineage_record()
    keep_advice(trunk, entry(step_dir))
    keep_advice(trunk, entry(step_dir, budget="9999"))
    keep_advice(trunk, entry(step_dir, checkpoint="0" * 64))
    keep_advice(trunk, entry(step_dir, advice="train on"))  # asked again
    assert [(e["advice"], e["budget"]) for e in read_advice(trunk)[2:]] == [("train on", "20%")]
    found = decide_growth(growing).lineage_record()["advice"]
    assert [(e["advice"], e["budget"]) for e in found] == [("grow now", "9999"), ("train on", "20%")]
    (trunk / "advice.json").write_text("{}x")
    with pytest.raises(UserError, match=r"advice\.json is damaged: remove it"):
        decide_growth(growing)


def hashes(folder: Path) -> dict[str, str]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def flops_per_token(n_layers: int) -> int:
    """Of TINY's model: 6 for every weight of a product, and attention: d 32, MLP 64, context 32, 258 ids."""
    layer = 4 * 32 * 32 + 3 * 32 * 64
    return 6 * (n_layers * layer + 258 * 32) + 6 * n_layers * 32 * 32


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["train_tpu.run", "port_torch.train"])
def test_a_whole_one_stopped_on_the_way_and_resumed(cache, tmp_path, engine):
    """A trunk of 80 updates; at step 60 it is asked whether to grow."""
    base, out = tmp_path / "base", tmp_path / "advice"
    text = make_text(tmp_path, 600)
    plain = without(without(without(TINY, "--save-every"), "--steps"), "--eval-every")
    trunk = (
        "--steps", "200", "--stop-at", "80", "--keep-steps", "60", "--save-every", "80", "--eval-every", "0",
        "--sigma", "0", "--document-mask",
    )  # fmt: skip
    run(cache, *plain, *trunk, "--data", text, "--out", base, module=engine)
    before = hashes(base)
    command = (base, "--at", "60", "--budget", "50%", "--out", out)

    first = start(cache, *command, module="stacking.advise")
    while not list(out.glob("at-60/train-on/metrics.jsonl")):
        assert first.poll() is None, first.communicate()
        time.sleep(0.1)
    first.send_signal(signal.SIGTERM)  # as Ctrl-C; that may be ignored where tests run
    said, err = first.communicate(timeout=120)
    assert (first.returncode, err.strip().splitlines()[-1]) == (130, "interrupted")
    # What it costs came first: 50% of 60 updates.
    assert "train on: 29 updates (14 of decay among them), 3,712 tokens" in said
    assert hashes(base) == before and not list(out.rglob("advice.json"))

    said, _ = run(cache, *command, module="stacking.advise", timeout=900)
    (answer,) = json.loads((out / "advice.json").read_text())
    assert answer["sentence"] in said and (out / "table.md").read_text().strip() in said

    # The run has only got the answer.
    assert json.loads((base / "advice.json").read_text()) == [answer]
    after = hashes(base)
    del after["advice.json"]
    assert after == before

    # Equal FLOPs, counted from the logs; the same place in the data; half at the peak, then to zero.
    spent = {}
    for arm, n_layers in (("train-on", 2), ("grow", 4)):
        rows = read_log(out / "at-60" / arm, "train")
        assert [row["step"] for row in rows] == list(range(60, 60 + len(rows)))
        assert [row["tokens"] for row in rows] == [step * 4 * 32 for step in range(60, 60 + len(rows))]
        spent[arm] = len(rows) * 4 * 32 * flops_per_token(n_layers)
        decay, warm = len(rows) // 2, len(rows) // 4 if arm == "grow" else 0
        rates = [min(1.0, (i + 1) / max(1, warm)) for i in range(len(rows) - decay)]
        rates += [left / decay for left in range(decay, 0, -1)]
        np.testing.assert_allclose([row["lr"] / 0.01 for row in rows], rates, rtol=1e-12)
    assert [a["flops"] for a in answer["arms"]] == list(spent.values())
    assert abs(spent["train-on"] - spent["grow"]) <= 4 * 32 * flops_per_token(2) / 2
    if engine == "train_tpu.run":  # up to the decay, that arm is the run itself, to the bit
        assert losses(out / "at-60/train-on")[:15] == losses(base)[60:75]

    # The losses are those of the arms' own evaluations, of all windows, in either engine: float32 sums.
    for a in answer["arms"]:
        (last,) = [
            row for row in read_log(out / "at-60" / a["arm"].replace(" ", "-"), "eval") if row["step"] > 60
        ]
        assert (a["nll"], answer["scored_tokens"]) == (
            pytest.approx(last["nll"], rel=1e-6),
            last["scored_tokens"],
        )
    difference = answer["difference"]
    assert difference["nll"] == pytest.approx(answer["arms"][1]["nll"] - answer["arms"][0]["nll"], rel=1e-9)
    assert answer["advice"] == decide(Estimate(difference["nll"], difference["standard_error"]))

    # Asked again, nothing is trained; another question is refused; what grows there says what was advised.
    again, _ = run_here(*command, module=MODULE)
    (kept,) = json.loads((base / "advice.json").read_text())
    assert "0 of 3 jobs" in again and kept | {"code": answer["code"]} == answer
    assert "was begun with --budget 50%" in refusal_here(*command[:3], "--out", out, module=MODULE)
    grown, _ = run_here(
        step_path(base / "checkpoints", 60), "--out", tmp_path / "grown", module="stacking.grow"
    )
    assert f"{answer['advice']} (4 layers)" in grown
    assert load_manifest(find_step(tmp_path / "grown")).lineage[-1]["advice"] == [kept]
    assert list_steps(base / "checkpoints") == [60, 80]
