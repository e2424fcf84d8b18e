"""Tasks during training change nothing of it, and say what eval.run says of the same checkpoint."""

import json
import shutil
from pathlib import Path

import pytest

from core.run.log import read_log
from tests.eval.small_sets import Sets
from tests.train_tpu.processes import TINY, losses, refusal_here, run_here, without

# A context that holds the questions of the small sets; TINY's has 32 positions.
ARGUMENTS = (*without(TINY, "--context"), "--context", "128")


@pytest.mark.slow
def test_a_run_with_tasks_is_the_run_without(text: Path, tmp_path: Path, sets: Sets) -> None:
    """Every loss and gradient norm to the bit; the last evaluation is that of eval.run on the checkpoint."""
    plain, asked = tmp_path / "plain", tmp_path / "asked"
    run_here(*ARGUMENTS, "--data", text, "--out", plain)
    tasks = ("--eval-tasks", "arc_easy,openbookqa", "--eval-data-dir", sets.folder, "--eval-questions", "5")
    run_here(*ARGUMENTS, "--data", text, "--out", asked, *tasks)
    assert losses(plain) == losses(asked) and len(losses(plain)) == 12
    rows = read_log(asked, "task")
    assert [(row["step"], row["task"], row["questions"]) for row in rows] == [
        (step, task, 12 if step == 12 else 5)
        for step in (0, 5, 10, 12)
        for task in ("arc_easy", "openbookqa")
    ]
    run_here(asked, "--tasks", "arc_easy,openbookqa", "--data-dir", sets.folder, module="eval.run")
    content = json.loads((asked / "eval" / "step-12" / "results.json").read_text())
    for row in rows[-2:]:
        metrics = content["evaluations"][row["task"]]["tasks"][row["task"]]["metrics"]
        for metric in ("acc", "acc_norm"):
            assert row[f"{row['task']}/{metric}"] == metrics[metric]["value"]


@pytest.mark.slow
def test_a_task_that_cannot_be_scored_ends_no_training(text: Path, tmp_path: Path, sets: Sets) -> None:
    """A continuation longer than the context: told, and the run goes on to its end."""
    data = tmp_path / "data"
    shutil.copytree(sets.folder, data)
    path = data / "openbookqa/test.jsonl"
    choices = [{"text": letter * 200, "label": letter} for letter in "AB"]
    line = json.dumps({"question": {"stem": "Which?", "choices": choices}, "answerKey": "A"})
    path.write_text(f"{path.read_text()}{line}\n")
    tasks = ("--eval-tasks", "openbookqa", "--eval-data-dir", data)
    out, _ = run_here(*ARGUMENTS, "--data", text, "--out", tmp_path / "run", *tasks)
    assert out.count("openbookqa was not evaluated: openbookqa has a continuation of 201 tokens") == 4
    assert len(losses(tmp_path / "run")) == 12


def test_a_wrong_name_is_told_before_anything_is_made(text: Path, tmp_path: Path, sets: Sets) -> None:
    data = ("--eval-tasks", "arc_easy", "--eval-data-dir", tmp_path / "nowhere")
    assert "--data-dir" in refusal_here(*ARGUMENTS, "--data", text, "--out", tmp_path / "run", *data)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_run_of_the_mirror_scores_what_eval_run_does(text: Path, tmp_path: Path, sets: Sets):
    """The last evaluation is that of eval.run on the exported folder."""
    folder, data = tmp_path / "run", ("--eval-tasks", "arc_easy", "--eval-data-dir", sets.folder)
    # AdamW is all that the mirror has.
    arguments = (*without(ARGUMENTS, "--optimizer"), "--data", text, "--out", folder, *data)
    run_here(*arguments, "--eval-questions", "5", module="port_torch.train")
    rows = read_log(folder, "task")
    assert [(row["step"], row["questions"]) for row in rows] == [(0, 5), (5, 5), (10, 5), (12, 12)]
    run_here(folder / "model", "--tasks", "arc_easy", "--data-dir", sets.folder, module="eval.run")
    (path,) = tmp_path.rglob("results.json")
    metrics = json.loads(path.read_text())["evaluations"]["arc_easy"]["tasks"]["arc_easy"]["metrics"]
    for metric in ("acc", "acc_norm"):
        assert rows[-1][f"arc_easy/{metric}"] == metrics[metric]["value"]
