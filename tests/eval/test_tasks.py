"""Tasks by name: groups whose tasks are in local files, and a hub that cannot be reached."""

import shutil
import time
from pathlib import Path

import datasets
import huggingface_hub
import pytest
from lm_eval.tasks import TaskManager

import eval.tasks
from core.errors import UserError
from core.tokenizer import load_tokenizer
from eval.compare import compare_task
from eval.evaluate import evaluate_task
from eval.harness import HarnessModel
from eval.hub import go_offline_if_unreachable
from eval.results import Results
from eval.tasks import DEFINITIONS, Tasks, _mentioned, open_tasks
from tests.eval.small_sets import Sets

NOBODY = "http://127.0.0.1:9"  # the port "discard": nothing listens there


@pytest.fixture(autouse=True)
def few_definitions(monkeypatch):
    """The harness's definitions of ARC alone: to index all of them takes seconds."""

    def manager(include_path: Path = DEFINITIONS / "arc", include_defaults: bool = False) -> TaskManager:
        return TaskManager(include_path=include_path, include_defaults=include_defaults)

    monkeypatch.setattr(eval.tasks, "TaskManager", manager)


def test_a_group_is_its_local_tasks(sets: Sets, tmp_path: Path):
    for name in ("ARC-Easy", "ARC-Challenge"):
        (tmp_path / "arc" / name).mkdir(parents=True)
        shutil.copy(sets.folder / "arc/ARC-Easy/test.jsonl", tmp_path / "arc" / name)
    with open_tasks(["arc_easy", "ai2_arc"], tmp_path) as tasks:
        assert tasks.names == ["arc_easy", "arc_challenge"]
        assert list(tasks.load("arc_challenge", None)["tasks"]) == ["arc_challenge"]
        assert list(tasks.files("arc_challenge")) == ["arc/ARC-Challenge/test.jsonl"]


@pytest.mark.parametrize(
    ("name", "near"), [("arc_eazy", "; near it are arc_easy, "), ("arc", "; near"), ("ö", " ")]
)
def test_an_unknown_name_is_told_before_the_definitions_are_indexed(monkeypatch, tmp_path: Path, name, near):
    monkeypatch.setattr(eval.tasks, "TaskManager", lambda: pytest.fail("indexes them"))
    for folder in (tmp_path, None):
        with pytest.raises(UserError, match=f"lm-eval has no task '{name}'{near}"):
            open_tasks(["arc_easy", name], folder).__enter__()


def test_a_value_that_is_no_name_is_told_by_the_index():
    with pytest.raises(UserError, match="lm-eval has no task 'multiple_choice' "):
        open_tasks(["multiple_choice"], None).__enter__()


@pytest.mark.slow
def test_no_name_is_unknown():
    values, defined = _mentioned()
    names = set(TaskManager().all_tasks)
    assert names <= values
    assert len(names) > 10_000 and len(names & defined) > 0.95 * len(names)


def test_a_hub_that_cannot_be_reached_is_said_soon(monkeypatch, tmp_path: Path, capfd):
    """Its libraries would try again for a minute, and say so 24 times."""
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", NOBODY)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setattr(datasets.config, name, False)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail(f"waits {seconds} s to try again"))
    go_offline_if_unreachable.cache_clear()
    with open_tasks(["arc_easy"], None) as tasks, pytest.raises(UserError, match="--data-dir, or try again"):
        tasks.load("arc_easy", None)
    assert huggingface_hub.constants.HF_HUB_OFFLINE and not capfd.readouterr().err
    go_offline_if_unreachable.cache_clear()


FILTERED = """
task: doubled
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}, cache_dir: {cache}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["\\n"], max_gen_toks: 4, do_sample: false}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
filter_list:
  - {{name: strict, filter: [{{function: regex, regex_pattern: "(yes)"}}, {{function: take_first}}]}}
  - {{name: loose, filter: [{{function: regex, regex_pattern: "(y)"}}, {{function: take_first}}]}}
"""


class Sayer:
    """A backend that answers a text, byte by byte of the tokenizer `bytes`."""

    context, budget, compiled, n_devices = 64, 64, False, 1

    def __init__(self, answer: str):
        self.answer = answer

    def stream(self, prompts, sampling, max_new_tokens, eos):
        for token in load_tokenizer("bytes").encode(self.answer).tolist():
            yield [token] * len(prompts)


def test_a_task_with_several_filters_has_each_question_once(tmp_path: Path):
    """As gsm8k: two ways to find the answer in a text. The harness gives each question twice."""
    (tmp_path / "q.jsonl").write_text("".join(f'{{"question": "{i}?", "answer": "yes"}}\n' for i in range(3)))
    task = FILTERED.format(data=tmp_path / "q.jsonl", cache=tmp_path / "cache")
    (tmp_path / "doubled.yaml").write_text(task)
    tasks = Tasks({"doubled": TaskManager(include_path=tmp_path, include_defaults=False)}, {"doubled": None})
    for name, answer in (("a", "yes"), ("b", "y")):
        model = HarnessModel(Sayer(answer), load_tokenizer("bytes"))
        tasks.files = lambda task: {}
        record, questions = evaluate_task(model, tasks, "doubled")
        Results(tmp_path / name, {"sha256": name, "name": name}, {}).add("doubled", record, questions)
    entry = record["tasks"]["doubled"]
    assert (entry["questions"], entry["of"], len(questions["doubled"])) == (3, 3, 3)
    assert {name: found["value"] for name, found in entry["metrics"].items()} == {
        "exact_match (strict)": 0.0, "exact_match (loose)": 0.0,
    }  # fmt: skip
    compared, _ = compare_task(tmp_path / "a", tmp_path / "b", "doubled", list(entry["metrics"]))
    assert compared["exact_match (strict)"].only_first == 3
    assert compared["exact_match (loose)"].difference == 0
