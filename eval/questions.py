"""The scored questions of a task: their texts' hashes, and the scores of several models on the same ones."""

import functools
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from core.checkpoint.manifest import NEW_RUN
from core.data import overlap
from core.data.versions import open_version
from core.errors import UserError
from core.folder_kinds import Kind, require_kind
from eval.results import RESULTS, Record, all_tasks, questions_file, read_results
from eval.settings import results_folder


def texts(value: Any) -> Iterator[str]:
    """All texts in a value of JSON, such as a document of a task."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from texts(inner)


def text_keys(document: Any) -> list[str]:
    """What a question is known by in the record of prepared data: `core.data.overlap.text_key` in hexadecimal
    of its texts, but for those that are too short to be looked for."""
    keys = map(overlap.text_key, texts(document))
    return list(dict.fromkeys(f"{key:016x}" for key in keys if key is not None))


def evaluated_folder(path: Path) -> Path:
    """Where a model's results lie: the folder itself, or where eval.run puts those of a run or a folder.

    Raises:
        UserError: it is none of these.
    """
    if (path / RESULTS).exists():
        return path
    if not path.is_dir():
        wrong = "is a file" if path.exists() else "is not there"
        raise UserError(f"{path} {wrong}: give runs, exported folders or folders of results")
    require_kind(path, "evaluate", Kind.CHECKPOINT, Kind.WEIGHTS)
    return results_folder(path)


def read_questions(folder: Path, task: str) -> dict[str, Record]:
    """The scored questions of a task by what identifies them; equal ones are told apart by their order.

    Raises:
        UserError: they are not there, or damaged.
    """
    path = questions_file(folder, task)
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        if any(not isinstance(row, dict) or not isinstance(row.get("question"), str) for row in rows):
            raise ValueError("it has lines that are no questions")
        whole = all_tasks(read_results(folder))[task]["questions"]
        if len(rows) != whole:
            raise ValueError(f"it has {len(rows)} of {whole} questions")
    except FileNotFoundError:
        raise UserError(f"{path} is not there any more: evaluate the model again") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}): remove it and evaluate the model again") from None
    questions: dict[str, Record] = {}
    for row in rows:
        key, n = row["question"], 0
        while f"{key}/{n}" in questions:
            n += 1
        questions[f"{key}/{n}"] = row
    return questions


class Seen:
    """Evaluation items that stand in training text, by what prepared data records of it."""

    notes: list[str]
    """Models that were trained on other data, too, or on data that is not known, as sentences."""

    def __init__(self, paths: Sequence[Path], contents: Sequence[Record]) -> None:
        """Opens prepared data; contents: results of the models that were trained on it.

        Raises:
            UserError: there is none, or nothing was looked for in it.
        """
        self.paths = " and ".join(map(str, paths))
        trained_on = [(content["model"].get("training") or {}).get("data", []) for content in contents]
        opened = [open_version(path, set().union(*trained_on)) for path in paths]
        known = {dataset.fingerprint for dataset in opened}
        self.notes = []
        for content, data in zip(contents, trained_on, strict=True):
            name = content["model"]["name"]
            if not data:
                self.notes.append(f"What {name} was trained on is not recorded in its results.")
            elif other := set(data) - known:
                self.notes.append(
                    f"{name} was trained on data that is not in {self.paths} (fingerprint "
                    f"{min(other)[:12]}): what stands in that is not left out."
                )
            if any(operation in NEW_RUN for operation in content["model"].get("lineage", [])):
                self.notes.append(
                    f"{name} began with the parameters of another model: what stands in the text that this "
                    f"was trained on is left out only where it stands in {self.paths}, too."
                )
        records = []
        for dataset in opened:
            records.append(dataset.overlap_record())
            if records[-1] is None:
                raise UserError(
                    f"{dataset.path} does not record which evaluation items its text has: prepare the same "
                    "text with --overlap count --eval-items FILE, all of it if it was appended to"
                )
        record = functools.reduce(overlap.joint, records)
        self._looked_for = set(record["text"].tolist())
        self._shared = set(record["text"][record["shared"]].tolist())

    def among(self, questions: dict[str, Record], task: str) -> tuple[set[str], int]:
        """The questions that stand in the training text, and how many others cannot be looked for.

        Raises:
            UserError: a text of theirs was not looked for, or the results do not tell.
        """
        seen, n_short = set(), 0
        for name, row in questions.items():
            if "text_keys" not in row:
                raise UserError(
                    f"{task} was evaluated by an older version, which kept no hashes of its texts: evaluate "
                    "again into another --out, and compare that"
                )
            keys = {int(key, 16) for key in row["text_keys"]}
            if not keys <= self._looked_for:
                raise UserError(
                    f"the texts of {task} were not looked for in {self.paths}: write them with eval.items, "
                    "and prepare the same text with --overlap count --eval-items FILE"
                )
            n_short += not keys
            if keys & self._shared:
                seen.add(name)
        return seen, n_short


class Scores(NamedTuple):
    """A metric of a task, of several models on the same questions."""

    values: Float[np.ndarray, "R N"]
    """Of each model and question: a score, or the bits of a document."""
    weights: Float[np.ndarray, " N"] | None
    """Bytes of the documents: the metric is a ratio of sums. None where it is the mean of scores."""


def read_scores(
    folders: Sequence[Path], task: str, metrics: Sequence[str], seen: Seen | None = None
) -> tuple[dict[str, Scores], str]:
    """Every metric of a task that is made of values of its questions, and what is to be said of those that
    were left out, "" without `seen`.

    Raises:
        UserError: the models were not asked the same questions, or fewer than two are left.
    """
    first, *others = read = [read_questions(folder, task) for folder in folders]
    for folder, rows in zip(folders[1:], others, strict=True):
        if first.keys() != rows.keys():
            raise UserError(
                f"{folders[0]} and {folder} were asked different questions in {task} "
                f"({len(first.keys() & rows.keys())} of {len(first)} and {len(rows)} are the same): evaluate "
                "both with the same --limit, --shots and data"
            )
    said = ""
    if seen is not None:
        left_out, n_short = seen.among(first, task)
        said = (
            f"{task}: {len(left_out):,} of {len(first):,} questions share {overlap.N} words in a row with "
            f"{seen.paths} and are left out; {n_short:,} have no text of {overlap.N} words, and cannot be "
            "looked for."
        )
        first = {name: row for name, row in first.items() if name not in left_out}
        if not first:
            raise UserError(f"every question of {task} shares {overlap.N} words in a row with {seen.paths}")
    if len(first) < 2:
        raise UserError(
            f"{task} has one question to compare, and one question does not show how much questions vary: "
            "evaluate with a larger --limit"
        )
    rows_of = [[rows[name] for name in first] for rows in read]
    scores = {}
    for metric in metrics:
        if "bytes" in rows_of[0][0]:
            if metric == "bits_per_byte":
                bits = [[-row["logprob"] / math.log(2) for row in rows] for rows in rows_of]
                n_bytes = np.array([row["bytes"] for row in rows_of[0]], float)
                scores[metric] = Scores(np.array(bits), n_bytes)
            continue
        values = [[row.get(metric) for row in rows] for rows in rows_of]
        if all(isinstance(value, int | float) for row in values for value in row):
            if metric == "perplexity":  # of a question it is the log-probability of its answer
                scores["log perplexity"] = Scores(-np.array(values, float), None)
            else:
                scores[metric] = Scores(np.array(values, float), None)
    return scores, said
