"""Evaluation sets from local files, as the harness's own task definitions expect them.

The sets travel in several layouts: that of their authors, that of Hugging Face. Each is brought into the
latter, with the fields checked, so that the task definitions (prompts, choices, metrics) stay the harness's.
"""

import functools
import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from core.data.formats import find_variant
from core.data.text import read_json_lines, read_text
from core.errors import UserError

Fields = dict[str, Any]


class Source(NamedTuple):
    """Where a task's splits lie under the data folder, and how to read them."""

    definition: str
    """The harness's own definition of the task: a path under its folder of tasks."""
    read: Callable[[Path], Iterator[Fields]]
    """The documents of a file, in the harness's layout."""
    files: dict[str, str]
    """Split -> path; the first is what is scored and must be there, the others are used where they are."""


class LocalSet(NamedTuple):
    """A task's documents, read."""

    splits: dict[str, list[Fields]]
    sha256: dict[str, str]
    """Of each file, by its path under the data folder."""


def local_source(task: str) -> Source | None:
    """Where the data folder keeps a task's documents; None for a task that is only on the hub."""
    if task.startswith("blimp_"):
        name = task.removeprefix("blimp_")
        return Source(
            f"blimp/{name}.yaml", lambda path: _blimp(path, name), {"train": "blimp/blimp.jsonl.xz"}
        )
    return SOURCES.get(task)


def read_local(task: str, source: Source, folder: Path) -> LocalSet:
    """A task's documents from the files under `folder`.

    Raises:
        UserError: the file to be scored is missing, or a line of a file lacks a field or is of another form.
    """
    splits, hashes = {}, {}
    scored = next(iter(source.files))
    for split, name in source.files.items():
        path = find_variant(folder / name)
        if path is not None:
            splits[split] = list(source.read(path))
            hashes[str(path.relative_to(folder))] = hashlib.sha256(path.read_bytes()).hexdigest()
            if not splits[split]:
                raise UserError(f"{path} has no documents for {task}")
        elif split == scored:
            raise UserError(
                f"the data of {task} is not there: {folder / name} is missing "
                "(without --data-dir it is downloaded from the Hub)"
            )
    return LocalSet(splits, hashes)


def _lines(path: Path) -> Iterator[tuple[str, Fields]]:
    """(where it is, object) of every line of a JSONL file."""
    for where, content in read_json_lines(path):
        if not isinstance(content, dict):
            raise UserError(f"{where} is not a JSON object")
        yield where, content


def _field(where: str, content: Fields, name: str, kind: type | tuple[type, ...] = str) -> Any:
    """The value of a field, checked."""
    if not isinstance(content, dict) or name not in content:
        raise UserError(f"{where} lacks the field {name!r}: it is of another format than expected")
    value = content[name]
    if not isinstance(value, kind):
        raise UserError(
            f"{where} has a {type(value).__name__} as {name!r}: it is of another format than expected"
        )
    return value


def _strings(where: str, content: Fields, name: str) -> list[str]:
    """The value of a field that is a list of texts, checked."""
    values = _field(where, content, name, list)
    if not all(isinstance(value, str) for value in values):
        raise UserError(
            f"{where} has a {name!r} that is not all texts: it is of another format than expected"
        )
    return values


def _choices(path: Path, question_field: str) -> Iterator[Fields]:
    """ARC and OpenBookQA: the authors' nested layout, or Hugging Face's flat one."""
    for where, content in _lines(path):
        question = content.get("question", content.get("question_stem"))
        if isinstance(question, dict):
            stem = _field(where, question, "stem")
            listed = _field(where, question, "choices", list)
            texts = [_field(where, choice, "text") for choice in listed]
            labels = [_field(where, choice, "label") for choice in listed]
        else:
            stem = _field(where, content, question_field)
            choices = _field(where, content, "choices", dict)
            texts, labels = (_strings(where, choices, name) for name in ("text", "label"))
        key = _field(where, content, "answerKey").strip()
        if key not in labels or len(texts) != len(labels):
            raise UserError(
                f"{where} has the 'answerKey' {key!r}, which is not a label of its choices {labels}"
            )
        yield {
            "id": str(content.get("id")),
            question_field: stem,
            "choices": {"text": texts, "label": labels},
            "answerKey": key,
        }


_arc = functools.partial(_choices, question_field="question")
_openbookqa = functools.partial(_choices, question_field="question_stem")


def _truthfulqa(path: Path) -> Iterator[Fields]:
    """The authors' mc_task.json: a list of questions, each with {answer: 1 or 0}."""
    for number, (_, item) in enumerate(read_json_lines(path), 1):
        where = f"{path}, question {number}"
        document: Fields = {"question": _field(where, item, "question")}
        for name in ("mc1_targets", "mc2_targets"):
            targets = _field(where, item, name, dict)
            document[name] = {"choices": list(targets), "labels": list(targets.values())}
            if any(label not in (0, 1) for label in targets.values()) or 1 not in targets.values():
                raise UserError(f"{where} has {name!r} that are not 1 for true answers and 0 for others")
        if sum(item["mc1_targets"].values()) != 1 or document["mc1_targets"]["labels"][0] != 1:
            raise UserError(f"{where} has 'mc1_targets' whose first answer is not the one that is true")
        yield document


def _piqa(path: Path) -> Iterator[Fields]:
    for where, content in _lines(path):
        texts = {name: _field(where, content, name) for name in ("goal", "sol1", "sol2")}
        label = _field(where, content, "label", int)
        if label not in (0, 1):
            raise UserError(f"{where} has the 'label' {label}, which is neither 0 nor 1")
        yield texts | {"label": label}


def _winogrande(path: Path) -> Iterator[Fields]:
    for where, content in _lines(path):
        document = {
            name: _field(where, content, name) for name in ("sentence", "option1", "option2", "answer")
        }
        if "_" not in document["sentence"] or document["answer"] not in ("1", "2"):
            raise UserError(f"{where} has no _ in its 'sentence', or an 'answer' that is not 1 or 2")
        yield document


def _lambada_openai(path: Path) -> Iterator[Fields]:
    return ({"text": _field(where, content, "text")} for where, content in _lines(path))


def _lambada_standard(path: Path) -> Iterator[Fields]:
    return ({"text": line} for line in read_text(path).split("\n") if line)


def _blimp(path: Path, name: str) -> Iterator[Fields]:
    yield from _blimp_sets(path).get(name, [])


@functools.lru_cache(maxsize=1)
def _blimp_sets(path: Path) -> dict[str, list[Fields]]:
    """All sets of the file by their names: it takes a second to read, and the group asks 67 times."""
    sets: dict[str, list[Fields]] = {}
    for where, content in _lines(path):
        pair = {kind: _field(where, content, kind) for kind in ("sentence_good", "sentence_bad")}
        sets.setdefault(_field(where, content, "UID"), []).append(pair)
    return sets


def wikitext_pages(text: str) -> Iterator[str]:
    """The pages of a raw WikiText file: a page begins at a heading of the first level, ` = Title = `.

    Two formulas of WikiText-2's test look like one and cut their pages in two: the harness has it so, too.
    """
    page: list[str] = []
    for line in text.removeprefix(" \n").split("\n"):
        heading = line.replace("= = =", "===").replace("= =", "==").strip()
        if heading.startswith("= ") and heading.endswith(" =") and "".join(page).strip():
            yield "\n".join(page)
            page = []
        page.append(line)
    if "".join(page).strip():
        yield "\n".join(page)


def _wikitext(path: Path) -> Iterator[Fields]:
    text = read_text(path)
    pages = list(wikitext_pages(text))
    if len(pages) < 2:
        raise UserError(f"{path} has no headings like ' = Title = ': it is not a raw WikiText file")
    return ({"page": page} for page in pages)


WIKITEXT_TEST = "wikitext-2-raw/wiki.test.raw"
SOURCES = {
    "arc_easy": Source("arc/arc_easy.yaml", _arc, {
        "test": "arc/ARC-Easy/test.jsonl", "train": "arc/ARC-Easy/train.jsonl",
        "validation": "arc/ARC-Easy/dev.jsonl",
    }),
    "arc_challenge": Source("arc/arc_challenge.yaml", _arc, {
        "test": "arc/ARC-Challenge/test.jsonl", "train": "arc/ARC-Challenge/train.jsonl",
        "validation": "arc/ARC-Challenge/dev.jsonl",
    }),
    "openbookqa": Source("openbookqa/openbookqa.yaml", _openbookqa, {
        "test": "openbookqa/test.jsonl", "train": "openbookqa/train.jsonl",
    }),
    "truthfulqa_mc1": Source("truthfulqa/truthfulqa_mc1.yaml", _truthfulqa, {
        "validation": "truthfulqa/mc_task.json",
    }),
    "truthfulqa_mc2": Source("truthfulqa/truthfulqa_mc2.yaml", _truthfulqa, {
        "validation": "truthfulqa/mc_task.json",
    }),
    "piqa": Source("piqa/piqa.yaml", _piqa, {"validation": "piqa/validation.jsonl"}),
    "winogrande": Source("winogrande/default.yaml", _winogrande, {
        "validation": "winogrande/validation.jsonl",
    }),
    "lambada_openai": Source("lambada/lambada_openai.yaml", _lambada_openai, {
        "test": "lambada/lambada_test_openai.jsonl",
    }),
    "lambada_standard": Source("lambada/lambada_standard.yaml", _lambada_standard, {
        "test": "lambada/lambada_test_plain_text.txt",
    }),
    "wikitext": Source("wikitext/wikitext.yaml", _wikitext, {
        "test": WIKITEXT_TEST, "validation": "wikitext-2-raw/wiki.valid.raw",
    }),
}  # fmt: skip
