"""Local files: brought into the harness's form whatever their layout, and refused by file, line and field."""

import json
import lzma
import tempfile
from pathlib import Path

import pytest

from core.errors import UserError
from eval.local_data import local_source, read_local, read_text, wikitext_pages
from eval.tasks import open_tasks
from tests.eval.conftest import KINDS, make
from tests.eval.small_sets import Sets, write
from tests.train_tpu.processes import refusal

ARC = "arc/ARC-Easy/test.jsonl"
CHOICES = [{"text": "ice", "label": "A"}, {"text": "fire", "label": "B"}]
NESTED = {"id": "1", "question": {"stem": "Cold?", "choices": CHOICES}, "answerKey": "A"}
FLAT = NESTED | {"question": "Cold?", "choices": {"text": ["ice", "fire"], "label": ["A", "B"]}}
TARGETS = {"mc1_targets": {"yes": 1, "no": 0}, "mc2_targets": {"yes": 1, "no": 0}}


def read(folder: Path, task: str) -> list[dict]:
    """The documents of a task that are scored."""
    source = local_source(task)
    return read_local(task, source, folder).splits[next(iter(source.files))]


def test_both_layouts_of_choices(tmp_path):
    """The authors' nested one and Hugging Face's; a blank line, and what only some take for line ends."""
    odd = json.loads(json.dumps(NESTED).replace("Cold?", "Is\\u2028ice\\u0085cold?"))
    lines = [json.dumps(NESTED), json.dumps(FLAT), "", json.dumps(odd, ensure_ascii=False)]
    write(tmp_path / ARC, "\r\n".join(lines) + "\n")
    first, second, third = read(tmp_path, "arc_easy")
    assert first == second == FLAT
    assert third["question"] == "Is\u2028ice\u0085cold?"


def changed(content: dict, **fields) -> str:
    """A line with other fields; None takes one away."""
    return json.dumps({name: value for name, value in (content | fields).items() if value is not None})


PIQA = {"goal": "g", "sol1": "a", "sol2": "b", "label": 0}
WINOGRANDE = {"sentence": "the _ is", "option1": "a", "option2": "b", "answer": "1"}
BLIMP = {"UID": "wh_island", "sentence_good": "a", "sentence_bad": "b"}


@pytest.mark.parametrize(
    ("task", "file", "line", "said"),
    [
        ("arc_easy", ARC, "{not json", ["line 2", "is not JSON"]),
        ("arc_easy", ARC, "[1]", ["line 2", "not a JSON object"]),
        ("arc_easy", ARC, changed(NESTED, answerKey=None), ["line 2", "lacks the field 'answerKey'"]),
        ("arc_easy", ARC, changed(NESTED, answerKey=1), ["line 2", "has a int as 'answerKey'"]),
        ("arc_easy", ARC, changed(NESTED, answerKey="C"), ["line 2", "'answerKey' 'C'", "['A', 'B']"]),
        ("arc_easy", ARC, changed(NESTED, question={"stem": "x"}), ["line 2", "lacks the field 'choices'"]),
        ("arc_easy", ARC, changed(NESTED, question={"stem": "x", "choices": ["a"]}), ["line 2", "'text'"]),
        ("arc_easy", ARC, changed(NESTED, question=None), ["line 2", "lacks the field 'question'"]),
        ("arc_easy", ARC, changed(FLAT, choices={"text": [1, 2], "label": ["A", "B"]}), ["line 2", "'text'"]),
        ("openbookqa", "openbookqa/test.jsonl", json.dumps(FLAT), ["line 2", "the field 'question_stem'"]),
        ("piqa", "piqa/validation.jsonl", changed(PIQA, label="0"), ["line 2", "has a str as 'label'"]),
        ("piqa", "piqa/validation.jsonl", changed(PIQA, label=2), ["line 2", "'label'"]),
        ("winogrande", "winogrande/validation.jsonl", changed(WINOGRANDE, sentence="no"), ["line 2", "no _"]),
        ("winogrande", "winogrande/validation.jsonl", changed(WINOGRANDE, answer="3"), ["line 2", "answer"]),
        ("lambada_openai", "lambada/lambada_test_openai.jsonl", '{"txt": ""}', ["line 2", "field 'text'"]),
    ],
)  # fmt: skip
def test_lines_are_refused(tmp_path, task, file, line, said):
    """The second line of a file is wrong; the sentence names file, line and what is wrong."""
    good = {"arc_easy": NESTED, "openbookqa": NESTED, "piqa": PIQA, "winogrande": WINOGRANDE}
    write(tmp_path / file, json.dumps(good.get(task, {"text": "a b"})) + f"\n{line}\n")
    with pytest.raises(UserError) as error:
        read(tmp_path, task)
    for part in (str(tmp_path / file), *said):
        assert part in str(error.value), error.value


@pytest.mark.parametrize(
    ("task", "file", "content", "said"),
    [
        ("truthfulqa_mc2", "truthfulqa/mc_task.json", "Type,Question\n", ["is not JSON"]),
        ("truthfulqa_mc2", "truthfulqa/mc_task.json", "{}", ["question 1", "lacks"]),
        (
            "truthfulqa_mc2", "truthfulqa/mc_task.json",
            json.dumps([{"question": "q"} | TARGETS, {"question": "q", "mc1_targets": {"yes": 1}}]),
            ["question 2", "'mc2_targets'"],
        ),
        (
            "truthfulqa_mc2", "truthfulqa/mc_task.json",
            json.dumps([{"question": "q"} | TARGETS | {"mc2_targets": {"yes": [1]}}]),
            ["question 1", "'mc2_targets'"],
        ),
        (
            "truthfulqa_mc1", "truthfulqa/mc_task.json",
            json.dumps([{"question": "q"} | TARGETS | {"mc1_targets": {"no": 0, "yes": 1}}]),
            ["question 1", "'mc1_targets' whose first"],
        ),
        ("wikitext", "wikitext-2-raw/wiki.test.raw", "Just a text.\nOf two lines.\n", ["= Title ="]),
        ("arc_easy", ARC, "\n\n", ["no documents for arc_easy"]),
    ],
)  # fmt: skip
def test_files_are_refused(tmp_path, task, file, content, said):
    write(tmp_path / file, content)
    with pytest.raises(UserError) as error:
        read(tmp_path, task)
    for part in (str(tmp_path / file), *said):
        assert part in str(error.value), error.value


def test_missing_files(tmp_path, sets: Sets):
    """The scored file must be there, the others need not; hashes say what was read."""
    with pytest.raises(UserError, match=r"arc_easy is not there: .*ARC-Easy/test\.jsonl is missing"):
        read(tmp_path, "arc_easy")
    found = read_local("arc_easy", local_source("arc_easy"), sets.folder)
    assert list(found.splits) == ["test"] and list(found.sha256) == [ARC]


def test_blimp_is_packed(tmp_path):
    path = tmp_path / "blimp/blimp.jsonl.xz"
    path.parent.mkdir()
    other = BLIMP | {"UID": "drop_argument", "sentence_good": "c"}
    path.write_bytes(lzma.compress("\n".join(map(json.dumps, (BLIMP, other, BLIMP))).encode()))
    pair = {"sentence_good": "a", "sentence_bad": "b"}
    assert read(tmp_path, "blimp_wh_island") == [pair, pair]
    assert read(tmp_path, "blimp_drop_argument") == [pair | {"sentence_good": "c"}]
    with pytest.raises(UserError, match="no documents for blimp_passive_1"):
        read(tmp_path, "blimp_passive_1")
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match=r"xz cannot be read: the file is cut short"):
        read_text(path)


def test_pages(sets: Sets):
    """Cut at headings of the first level alone."""
    text = (sets.folder / "wikitext-2-raw/wiki.test.raw").read_text()
    assert list(wikitext_pages(text)) == [page.raw for page in sets.pages]
    assert list(wikitext_pages(" \n = A = \n \n = = b = = \n = = = c = = = \n x = y \n = D = \n d")) == [
        " = A = \n \n = = b = = \n = = = c = = = \n x = y ",
        " = D = \n d",
    ]


def test_a_data_folder_that_is_none(sets: Sets):
    for folder, why in ((sets.folder / "not", "is not there"), (sets.folder / ARC, "is a file")):
        with pytest.raises(UserError, match=why), open_tasks(["arc_easy"], folder):
            pass


def test_nothing_is_left_behind(sets: Sets, tmp_path, monkeypatch):
    """Neither after the tasks nor after a refusal."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with open_tasks(["arc_easy", "truthfulqa_mc2"], sets.folder) as tasks:
        loaded = tasks.load("arc_easy", None)["tasks"]["arc_easy"]
        assert len(list(loaded.test_docs())) == len(sets.questions["arc_easy"])
        assert list(tmp_path.iterdir())
    assert not list(tmp_path.iterdir())
    with pytest.raises(UserError), open_tasks(["openbookqa", "piqa"], sets.folder):
        pass
    assert not list(tmp_path.iterdir())


def test_shots_come_from_the_training_file(sets: Sets, tmp_path):
    """And are refused where there is none."""
    with (
        open_tasks(["arc_easy"], sets.folder) as tasks,
        pytest.raises(UserError, match="no documents to take"),
    ):
        tasks.load("arc_easy", 2)
    train = [NESTED | {"question": {"stem": f"Stem {i}?", "choices": CHOICES}} for i in range(5)]
    write(tmp_path / ARC, json.dumps(NESTED) + "\n")
    write(tmp_path / "arc/ARC-Easy/train.jsonl", "\n".join(map(json.dumps, train)))
    with open_tasks(["arc_easy"], tmp_path) as tasks:
        with pytest.raises(UserError, match="arc_easy has 5 documents"):
            tasks.load("arc_easy", 5)
        task = tasks.load("arc_easy", 2)["tasks"]["arc_easy"]
        task.build_all_requests(limit=None, rank=0, world_size=1)
    context = task.instances[0].args[0]
    shots, question = context.rsplit("\n\n", 1)
    assert question == "Question: Cold?\nAnswer:"
    assert len(set(shots.split("\n\n"))) == 2
    assert {shot.split("\n")[0] for shot in shots.split("\n\n")} <= {
        f"Question: {row['question']['stem']}" for row in train
    }
    assert {shot.split("\n")[1] for shot in shots.split("\n\n")} == {"Answer: ice"}


@pytest.mark.slow
def test_neither_network_nor_data(tmp_path):
    """One sentence that says so, for a task of the hub and for one that could be local."""
    made = make(tmp_path, "gpt", *KINDS["gpt"])
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hub")}
    for task in ("hellaswag", "arc_easy"):
        said = refusal(
            tmp_path,
            made.folder,
            "--tasks",
            task,
            "--out",
            tmp_path / "out",
            module="eval.run",
            environ=offline,
        )
        assert f"the data of {task} is neither in a --data-dir nor on this machine" in said
