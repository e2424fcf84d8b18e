"""One task evaluated: the harness asks, scores and aggregates; what is recorded is read by eval.results."""

import functools
import hashlib
import json
import math
import time
from typing import Any

import lm_eval.api.task
import numpy as np
from lm_eval.evaluator import evaluate as run_harness
from tqdm import tqdm

from core.errors import UserError
from core.progress import Activity
from eval.harness import HarnessModel
from eval.questions import text_keys
from eval.ratio import ratio_of_sums
from eval.tasks import Tasks

BOOTSTRAP = 1000  # resamples for the standard error of metrics that have no formula for it
ROLLING = "loglikelihood_rolling"

lm_eval.api.task.tqdm = functools.partial(tqdm, disable=True)  # progress is shown once, by core.progress

Record = dict[str, Any]


def evaluate_task(
    model: HarnessModel, tasks: Tasks, name: str, shots: int | None = None, limit: int | None = None
) -> tuple[Record, dict[str, list[Record]]]:
    """Evaluates a task, or every task of a group.

    Returns:
        What goes into the results (tasks and groups with metrics), and the scored questions of each task.

    Raises:
        UserError: its documents are not to be had (`Tasks.load`), or it cannot be run or scored here.
    """
    started = time.monotonic()
    model.task, model.n_truncated, model.bos_nats = name, 0, 0.0
    with Activity(f"evaluating {name}"):
        loaded = tasks.load(name, shots)
        try:
            found = run_harness(model, loaded, limit=limit, bootstrap_iters=BOOTSTRAP)
        except UserError:
            raise
        except (ImportError, ValueError, NotImplementedError) as error:  # unsafe code, images, chat templates
            raise UserError(f"the task {name} cannot be run here: {error}") from None
    record: Record = {
        "seconds": round(time.monotonic() - started, 1),
        "truncated": model.n_truncated,
        "tasks": {},
        "groups": {},
    }
    questions = {}
    for task, rows in found["samples"].items():
        rolling = loaded["tasks"][task].OUTPUT_TYPE == ROLLING
        questions[task] = _questions(rows, rolling)
        record["tasks"][task] = {
            "version": found["versions"][task],
            "shots": found["n-shot"][task],
            "questions": len(questions[task]),
            "of": found["n-samples"][task]["original"],
            "requests_sha256": _hash([row["question"] for row in questions[task]]),
            "files_sha256": tasks.files(task),
            "chance": _chance(questions[task]),
            "higher_is_better": found["higher_is_better"][task],
            "metrics": _metrics(found["results"][task]),
        }
        if rolling:
            record["tasks"][task] |= _rolling(questions[task], model.bos_nats * len(questions[task]))
    for group, values in found.get("groups", {}).items():
        record["groups"][group] = {"metrics": _metrics(values)}
    return record, questions


def _metrics(values: Record) -> Record:
    """{"acc,none": v, "acc_stderr,none": e} as {"acc": {"value": v, "stderr": e}}; filters are named."""
    metrics: Record = {}
    for key, value in values.items():
        name, _, filtered = key.partition(",")
        if not filtered or not isinstance(value, int | float | np.number):
            continue
        stderr = name.endswith("_stderr")
        label = _label(name.removesuffix("_stderr"), filtered)
        entry = metrics.setdefault(label, {"value": math.nan, "stderr": None})
        entry["stderr" if stderr else "value"] = float(value)
    return metrics


def _label(name: str, filtered: str) -> str:
    """What a metric, or a text, is called that was taken from an answer by a filter of the harness."""
    return name if filtered == "none" else f"{name} ({filtered})"


def _questions(rows: list[Record], rolling: bool) -> list[Record]:
    """The questions of a task as scored, each once: the harness gives a row of it for every filter."""
    questions: dict[int, Record] = {}
    for row in rows:
        questions[row["doc_id"]] = questions.get(row["doc_id"], {}) | _question(row, rolling)
    return list(questions.values())


def _question(row: Record, rolling: bool) -> Record:
    """A question as scored: what identifies it, log-probabilities and metrics."""
    arguments = [list(map(str, argument)) for argument in row["arguments"]]
    question: Record = {
        "id": row["doc_id"], "question": _hash(arguments), "text_keys": text_keys(row["doc"]),
    }  # fmt: skip
    responses = row["filtered_resps"]
    if rolling:
        logprob, n_bytes = row["bits_per_byte"]
        return question | {"logprob": logprob, "bytes": n_bytes, "words": row["word_perplexity"][1]}
    question["target"] = row["target"]
    if all(isinstance(response, tuple | list) for response in responses):
        question["logprobs"] = [response[0] for response in responses]
    else:
        question[_label("texts", row["filter"])] = responses
    return question | {_label(name, row["filter"]): row[name] for name in row["metrics"] if name in row}


def _rolling(questions: list[Record], bos_nats: float) -> Record:
    """What belongs to a perplexity: the error of bits per byte over documents, and what `<s>` cost in it."""
    nats = -np.array([row["logprob"] for row in questions])
    n_bytes = np.array([row["bytes"] for row in questions], float)
    n_words = sum(row["words"] for row in questions)
    return {
        "words": n_words,
        "bytes": int(n_bytes.sum()),
        "bits_per_byte_stderr": ratio_of_sums(nats, n_bytes)[1] / math.log(2),
        "bos_nats": bos_nats,
        "word_perplexity_without_bos": float(np.exp((nats.sum() - bos_nats) / n_words)),
        "bits_per_byte_without_bos": (nats.sum() - bos_nats) / n_bytes.sum() / math.log(2),
    }


def _chance(questions: list[Record]) -> float | None:
    """Accuracy of guessing among the choices; None where there are none, or nothing is wrong."""
    n_choices = [len(question.get("logprobs", [])) for question in questions]
    if min(n_choices) < 2 or any(question.get("acc") not in (0, 1) for question in questions):
        return None
    return float(np.mean([1 / n for n in n_choices]))


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:32]
