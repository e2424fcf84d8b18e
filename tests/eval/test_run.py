"""The command: everything that is needed to repeat a figure, nothing twice, nothing lost."""

import hashlib
import json
import re
import shutil
import signal
import time
from importlib import metadata
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from core.checkpoint.manifest import EXPORT_MANIFEST
from core.data.overlap import text_key
from core.errors import UserError
from core.locks import hold_file
from eval import perplexity, run
from eval.compare import compare_task
from eval.models import open_model
from eval.questions import evaluated_folder
from eval.results import Results, markdown, plot, read_results
from port_torch.folder import open_folder
from tests.eval.conftest import KINDS, Made, make
from tests.eval.small_sets import Sets, write_sets
from tests.models import random_params
from tests.port_torch.folders import write_checkpoint
from tests.train_tpu.processes import refusal, start
from tests.train_tpu.processes import run as run_process

SOME = "arc_easy,truthfulqa_mc2,wikitext"


def command(*arguments: str | Path) -> None:
    """The command in this process; what it prints is pytest's to capture."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["run", *map(str, arguments)])
        assert run.main() == 0


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """One model is enough here: the kind that fits TruthfulQA's prompts into its context only in part."""
    return make(tmp_path_factory.mktemp("small"), "gpt", *KINDS["gpt"])


@pytest.fixture
def folder(small: Made, tmp_path: Path) -> Path:
    """A copy of its folder, to be written into."""
    return shutil.copytree(small.folder, tmp_path / "model")


def test_results(folder: Path, sets: Sets, capsys):
    """What is in the files, and that the same command again evaluates nothing."""
    arguments = (folder, "--tasks", SOME, "--data-dir", sets.folder, "--device", "cpu")
    command(*arguments)
    printed = capsys.readouterr()
    out = folder.with_name("model-eval")
    content = read_results(out)
    manifest = json.loads((folder / EXPORT_MANIFEST).read_text())
    model = content["model"]
    assert (model["kind"], model["sha256"]) == ("folder", manifest["sha256"])
    assert model["config"] == manifest["config"]["model"] and model["tokenizer"] == manifest["tokenizer"]
    assert (model["step"], model["tokens"]) == (7, 700) and model["lineage"] == ["test", "convert"]
    assert list(content["evaluations"]) == SOME.split(",")
    for name, evaluation in content["evaluations"].items():
        assert evaluation["settings"] == {
            "backend": "folder", "dtype": "float32", "shots": None, "limit": None, "fewshot_seed": 1234,
            "bootstrap": 1000, "bos": True, "lm_eval": metadata.version("lm_eval"),
        }  # fmt: skip
        assert {"lm_eval", "datasets", "torch", "transformers", "jax"} <= set(evaluation["versions"])
        assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d [+-]\d{4}", evaluation["date"])
        (task,) = evaluation["tasks"].values()
        (path,) = task["files_sha256"]
        assert task["files_sha256"][path] == hashlib.sha256((sets.folder / path).read_bytes()).hexdigest()
        rows = [json.loads(line) for line in (out / f"questions/{name}.jsonl").read_text().splitlines()]
        asked = sets.pages if name == "wikitext" else sets.questions[name]
        assert len(rows) == task["questions"] == task["of"] == len(asked)
        assert [row["id"] for row in rows] == list(range(len(rows)))
        assert len({row["question"] for row in rows}) == len(rows)
        if name == "wikitext":
            long = [page.raw for page in sets.pages if len(re.findall(r"[^\W_]+", page.raw)) >= 13]
            assert [key for row in rows for key in row["text_keys"]] == [f"{text_key(t):016x}" for t in long]
        assert len(task["requests_sha256"]) == 32 and task["shots"] == 0
    metrics = content["evaluations"]["arc_easy"]["tasks"]["arc_easy"]["metrics"]
    rows = [json.loads(line) for line in (out / "questions/arc_easy.jsonl").read_text().splitlines()]
    for name in ("acc", "acc_norm"):
        value, n = sum(row[name] for row in rows) / len(rows), len(rows)
        assert metrics[name]["value"] == pytest.approx(value)
        assert metrics[name]["stderr"] == pytest.approx((value * (1 - value) / (n - 1)) ** 0.5)
    truncated = content["evaluations"]["truthfulqa_mc2"]["truncated"]
    assert truncated == sum(len(row.choices) for row in sets.questions["truthfulqa_mc2"])
    assert f"{truncated} requests were longer than the context of 320 tokens" in printed.err

    page = (out / "results.md").read_text()
    value = content["evaluations"]["wikitext"]["tasks"]["wikitext"]["metrics"]["word_perplexity"]["value"]
    assert f"| wikitext | word_perplexity | {value:.2f} |" in page
    assert f"{truncated} truncated" in page and "scored once per document" in page and "GPT-2 124M" in page
    assert (out / "results.png").read_bytes()[:4] == b"\x89PNG"

    # Of a tokenizer without bos, evaluated with another version of the harness.
    wikitext = content["evaluations"]["wikitext"]
    wikitext["tasks"]["wikitext"]["bos_nats"] = 0.0
    wikitext["settings"]["lm_eval"] = "0.0.1"
    other = markdown(content)
    assert "bytes of the original text" in other and "scored once per document" not in other
    assert f"| lm-eval 0.0.1, lm-eval {metadata.version('lm_eval')}, 0-shot" in other

    before = (out / "results.json").read_bytes()
    command(*arguments)
    assert capsys.readouterr().out.count("already evaluated") == 3
    assert (out / "results.json").read_bytes() == before
    command(*arguments[:2], "arc_easy,openbookqa", *arguments[3:])
    printed = capsys.readouterr().out
    assert "arc_easy: already evaluated" in printed and "openbookqa: acc" in printed
    assert list(read_results(out)["evaluations"]) == [*SOME.split(","), "openbookqa"]


def plotted(content: dict, path: Path) -> dict[str, list[str]]:
    """The plot's panels by their titles, with the models in each."""
    with pytest.MonkeyPatch.context() as patch:
        panels = {}

        def read(figure, *_, **__) -> None:
            for axis in figure.axes:
                if axis.get_title():
                    panels[axis.get_title()] = [label.get_text() for label in axis.get_yticklabels()]

        patch.setattr("eval.results.write_picture", read)
        plot(content, path)
    return panels


def test_a_limit_is_said(folder: Path, sets: Sets, tmp_path: Path):
    """In the table and the results; the whole set is not taken for evaluated, and replaces it."""
    arguments = (
        folder,
        "--tasks",
        "arc_easy",
        "--data-dir",
        sets.folder,
        "--device",
        "cpu",
        "--out",
        tmp_path / "o",
    )
    command(*arguments, "--limit", "5")
    page, n = (tmp_path / "o/results.md").read_text(), len(sets.questions["arc_easy"])
    assert f"ONLY 5 of {n}" in page and "GPT-2 124M" not in page
    why = "Not compared, since published figures are of all questions: arc_easy"
    assert f"{why} (ONLY 5 of {n} questions).\n" in page
    shown = plotted(read_results(tmp_path / "o"), tmp_path / "part.png")
    assert shown == {f"arc_easy {m}, %\nONLY 5 of {n} questions": ["model"] for m in ("acc", "acc_norm")}
    assert len((tmp_path / "o/questions/arc_easy.jsonl").read_text().splitlines()) == 5
    command(*arguments)
    shown = plotted(read_results(tmp_path / "o"), tmp_path / "whole.png")
    assert "GPT-2 124M" in shown[f"arc_easy acc, %\n{n} questions"]
    page = (tmp_path / "o/results.md").read_text()
    assert "ONLY" not in page and "| GPT-2 124M | 43.8 / 39.5 |" in page and "Not compared" not in page
    command(*arguments[:2], "wikitext", *arguments[3:], "--limit", "1")  # next to whole sets
    page = (tmp_path / "o/results.md").read_text()
    assert "| GPT-2 124M | 43.8 / 39.5 |" in page and "37.37 per word" not in page
    assert f"{why.partition('arc_easy')[0]}wikitext (ONLY 1 of {len(sets.pages)} questions).\n" in page
    assert len((tmp_path / "o/questions/arc_easy.jsonl").read_text().splitlines()) == n


def test_other_data_are_evaluated_anew(folder: Path, sets: Sets, tmp_path: Path, capsys):
    """What was evaluated is known by the hashes of its files, not by the name of the task."""
    other = shutil.copytree(sets.folder, tmp_path / "other")
    path = other / "openbookqa/test.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:6]))
    arguments = (
        folder,
        "--tasks",
        "arc_easy,openbookqa",
        "--device",
        "cpu",
        "--out",
        tmp_path / "o",
        "--data-dir",
    )
    command(*arguments, sets.folder)
    capsys.readouterr()
    command(*arguments, other)
    printed = capsys.readouterr().out
    assert "arc_easy: already evaluated" in printed and "openbookqa: acc" in printed
    (entry,) = read_results(tmp_path / "o")["evaluations"]["openbookqa"]["tasks"].values()
    assert entry["questions"] == 6
    assert entry["files_sha256"] == {"openbookqa/test.jsonl": hashlib.sha256(path.read_bytes()).hexdigest()}


def evaluated(metrics: dict, **tasks: int) -> tuple[dict, dict]:
    """The record of an evaluation of so many questions of each task, and the questions."""
    entries = {
        task: {
            "version": 1.0, "shots": 0, "questions": n, "of": n, "files_sha256": {}, "chance": None,
            "metrics": {"acc": {"value": 1.0, "stderr": None}},
        }
        for task, n in tasks.items()
    }  # fmt: skip
    questions = {task: [{"question": f"{i}", "acc": 1.0} for i in range(n)] for task, n in tasks.items()}
    return {"seconds": 1.0, "truncated": 0, "tasks": entries, "groups": metrics}, questions


def test_a_task_of_a_group_evaluated_otherwise_leaves_the_group_unfinished(tmp_path: Path):
    """Its questions are gone, so what the group has of it goes, too; the group's other tasks stay."""
    model, group = {"name": "m", "sha256": "1", "kind": "folder"}, {"both": {"metrics": {}}}

    def opened(limit: int | None) -> Results:
        return Results(tmp_path, model, {"limit": limit, "dtype": "float32"})

    opened(None).add("both", *evaluated(group, one=5, two=5))
    opened(None).add("one", *evaluated({}, one=5))  # alike: both stay
    assert all(opened(None).has(name, lambda task: {}) for name in ("both", "one"))
    opened(2).add("one", *evaluated({}, one=2))
    left = read_results(tmp_path)["evaluations"]
    assert {name: list(entry["tasks"]) for name, entry in left.items()} == {"both": ["two"], "one": ["one"]}
    assert left["both"]["groups"] == {} and left["one"]["tasks"]["one"]["questions"] == 2
    assert not opened(None).has("both", lambda task: {}) and opened(2).has("one", lambda task: {})
    opened(None).add("both", *evaluated(group, one=5, two=5))
    left = read_results(tmp_path)["evaluations"]
    assert (
        list(left) == ["both"] and left["both"]["groups"] == group and opened(None).has("both", lambda t: {})
    )


def test_what_is_said_to_be_evaluated_again_is(tmp_path: Path):
    """Questions that were lost are asked again; eval.compare says what to do with damaged ones."""
    results = Results(tmp_path, {"name": "m", "sha256": "1"}, {})
    results.add("one", *evaluated({}, one=5))
    (tmp_path / "questions/one.jsonl").write_text("{")
    with pytest.raises(
        UserError, match=r"one\.jsonl cannot be read .*: remove it and evaluate the model again"
    ):
        compare_task(tmp_path, tmp_path, "one", ["acc"])
    (tmp_path / "questions/one.jsonl").unlink()
    assert not results.has("one", lambda task: {})


def test_a_checkpoint_in_no_run_has_its_results_next_to_it(tmp_path: Path, monkeypatch):
    """An imported one: they went two folders up, and were called after that."""
    config = KINDS["gpt"][0]
    write_checkpoint(tmp_path / "a/b/mine", config, random_params(config))
    monkeypatch.chdir(tmp_path / "a/b")
    opened = open_model(Path("mine"), "float32")
    assert opened.results == tmp_path / "a/b/mine-eval" and opened.identity["name"] == "mine"
    assert evaluated_folder(Path("mine")) == opened.results


def test_results_of_another_model_are_kept(folder: Path, small: Made, sets: Sets, tmp_path: Path):
    """The checkpoint is another one than the folder; damaged results are not written over."""
    arguments = ("--tasks", "arc_easy", "--data-dir", sets.folder, "--limit", "2", "--out", tmp_path / "o")
    command(folder, *arguments, "--device", "cpu")
    before = (tmp_path / "o/results.json").read_bytes()
    with pytest.raises(UserError, match=r"results of another model \(model, sha256 .*give another --out"):
        command(small.run, *arguments)
    assert (tmp_path / "o/results.json").read_bytes() == before
    (tmp_path / "o/results.json").write_bytes(before[:-20])
    with pytest.raises(UserError, match=r"results\.json cannot be read"):
        command(folder, *arguments, "--device", "cpu")


def test_another_evaluation_does_not_write_the_same_file(folder: Path, tmp_path: Path, monkeypatch):
    """Each would write what it knows, so that of two the tasks of one were lost; perplexities likewise."""
    out = tmp_path / "o"
    (tmp_path / "a.txt").write_text("a")
    text = ("perplexity", str(folder), "--text", str(tmp_path / "a.txt"), "--out", str(out))
    for module, file, arguments in (
        (run, "results.json", ("run", str(folder), "--tasks", "arc_easy", "--out", str(out))),
        (perplexity, "perplexity.json", text),
    ):
        monkeypatch.setattr("sys.argv", [*arguments, "--device", "cpu"])
        with (
            hold_file(out / file, "taken"),
            pytest.raises(UserError, match=f"^another process evaluates into {out}: "),
        ):
            module.main()
    assert not out.exists()


def test_the_card(folder: Path, sets: Sets, tmp_path: Path):
    """Written twice it says everything once; the hub's library reads it; the folder still verifies.

    What its owner wrote below the results stays.
    """
    text = ModelCard.load(folder / "README.md").text.strip()
    arguments = (
        folder,
        "--data-dir",
        sets.folder,
        "--device",
        "cpu",
        "--out",
        tmp_path / "o",
        "--card",
        "--tasks",
    )
    command(*arguments, "arc_easy")
    once = (folder / "README.md").read_text()
    command(*arguments, "arc_easy")
    assert (folder / "README.md").read_text() == once
    own = "\n## Citation\n\nMine.\n"
    (folder / "README.md").write_text(once + own)
    command(*arguments, "arc_easy,wikitext")
    assert (folder / "README.md").read_text().endswith(f" |\n{own}")
    card = ModelCard.load(folder / "README.md")
    assert (
        card.text.strip().startswith(text)
        and card.text.count("## Evaluation with lm-evaluation-harness") == 1
    )
    found = {(row.dataset_type, row.metric_type): row.metric_value for row in card.data.eval_results}
    assert len(found) == len(card.data.eval_results)
    tasks = {
        name: entry["tasks"][name]["metrics"]
        for name, entry in read_results(tmp_path / "o")["evaluations"].items()
    }
    assert found == {
        ("arc_easy", "acc"): tasks["arc_easy"]["acc"]["value"],
        ("arc_easy", "acc_norm"): tasks["arc_easy"]["acc_norm"]["value"],
        ("wikitext", "word_perplexity"): tasks["wikitext"]["word_perplexity"]["value"],
        ("wikitext", "bits_per_byte"): tasks["wikitext"]["bits_per_byte"]["value"],
    }
    assert (card.data.model_name, card.data.license) == ("folder-gpt", "mit")
    assert open_folder(folder).manifest is not None


def test_refusals(folder: Path, small: Made, sets: Sets, tmp_path: Path):
    """Before anything is evaluated."""
    data = ("--data-dir", sets.folder)
    for arguments, said in (
        (
            (tmp_path / "no", "--tasks", "arc_easy", *data),
            "is not there: give a run, one checkpoint in it, an exported folder, or hf:OWNER/NAME",
        ),
        ((folder, "--tasks", " , "), "does not name a task"),
        ((folder, "--limit", "0"), "--limit is 0"),
        ((folder, "--shots", "-1"), "--shots is -1"),
        ((small.run, "--tasks", "arc_easy", *data, "--card"), "is a checkpoint; convert it first"),
        ((small.run, "--tasks", "arc_easy", *data, "--device", "cpu"), "set JAX_PLATFORMS"),
        ((folder, "--tasks", "piqa", *data), "the data of piqa is not there"),
        ((folder, "--tasks", "arc_easy", *data, "--out", folder / "README.md"), "is a file: name another"),
    ):
        with pytest.raises(UserError, match=re.escape(said)):
            command(*arguments)
    (folder / "README.md").unlink()
    with pytest.raises(UserError, match=r"README\.md is not there"):
        command(folder, "--tasks", "arc_easy", *data, "--card")
    assert not folder.with_name("model-eval").exists()


@pytest.mark.slow
def test_a_run_is_evaluated_and_goes_on_after_ctrl_c(small: Made, tmp_path: Path):
    """Interrupted in its second task it ends with 130 and keeps the first; the same command does the rest."""
    sets = write_sets(tmp_path / "data", n=400, n_pages=4)
    arguments = (small.run, "--tasks", "openbookqa,truthfulqa_mc2", "--data-dir", sets.folder)
    results = small.run / "eval/step-7/results.json"
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    process = start(tmp_path, *arguments, module="eval.run", environ={"TMPDIR": str(temporary)})
    deadline = time.monotonic() + 200
    while not results.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=100)
    assert process.returncode == 130 and "Traceback" not in err, err
    assert "interrupted: finished tasks are in" in err
    assert not list(temporary.glob("mtlm-eval-*"))
    first = json.loads(results.read_text())["evaluations"]
    assert list(first) == ["openbookqa"]
    assert not (results.parent / "results.md").exists()
    out, _ = run_process(tmp_path, *arguments, module="eval.run")
    assert "openbookqa: already evaluated" in out and "truthfulqa_mc2: acc" in out
    evaluations = json.loads(results.read_text())["evaluations"]
    assert evaluations["openbookqa"] == first["openbookqa"] and list(evaluations) == [
        "openbookqa",
        "truthfulqa_mc2",
    ]
    assert (results.parent / "results.md").exists()
    said = refusal(tmp_path, small.run, "--tasks", "arc_easy", "--data-dir", tmp_path, module="eval.run")
    assert "ARC-Easy/test.jsonl is missing" in said
