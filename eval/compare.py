"""`python -m eval.compare A B ...`: results side by side, with the significance of each difference.

Models that answered the same questions are compared question by question: the questions' own difficulty, most
of the spread of a score, cancels. So a difference far below two standard errors of the scores may be clear,
and one above may be luck. Each model is compared with the first.
"""

import dataclasses
import json
import math
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import tyro
from jaxtyping import Float

from core import cli
from core.errors import UserError, run_command
from core.folder_kinds import Kind, require_kind
from core.folders import write_atomically
from eval.ratio import ratio_of_sums
from eval.results import RESULTS, all_tasks, figures, protocol, read_results, shown, table
from eval.settings import results_folder


@dataclasses.dataclass(frozen=True)
class CompareConfig:
    """Compare evaluated models: two growths, an ablation with its base, a checkpoint with its export."""

    models: Annotated[list[Path], tyro.conf.Positional, tyro.conf.arg(metavar="MODEL...")]
    """Two or more that eval.run has evaluated: runs, exported folders, or folders of results."""
    out: Path | None = None
    """Also write the tables to this Markdown file."""


class Compared(NamedTuple):
    """One metric of a task, on the questions that two models share."""

    difference: float
    """Second minus first, in the metric's own unit."""
    stderr: float
    """Of the difference, over questions."""
    p: float
    """Chance of a difference at least as large if the models were alike (two-sided)."""
    test: str
    only_first: int | None
    """Questions that only the first gets right; None where answers are not right or wrong."""
    only_second: int | None


def evaluated_folder(path: Path) -> Path:
    """Where a model's results lie: the folder itself, or where eval.run puts those of a run or a folder."""
    if (path / RESULTS).exists():
        return path
    if not path.exists():
        raise UserError(f"{path} is not there: give runs, exported folders or folders of results")
    require_kind(path, "evaluate", Kind.CHECKPOINT, Kind.WEIGHTS)
    return results_folder(path)


def read_questions(folder: Path, task: str) -> dict[str, dict[str, Any]]:
    """The scored questions of a task by what identifies them; equal ones are told apart by their order."""
    path = folder / "questions" / f"{task}.jsonl"
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}): evaluate the model again") from None
    questions: dict[str, dict[str, Any]] = {}
    for row in rows:
        key, n = row["question"], 0
        while f"{key}/{n}" in questions:
            n += 1
        questions[f"{key}/{n}"] = row
    return questions


def compare_values(first: Float[np.ndarray, " N"], second: Float[np.ndarray, " N"]) -> Compared:
    """Compares a score of the same N questions.

    Right or wrong: McNemar's exact test, which asks only of the questions that one model alone gets right. A
    share (mc2): the paired t-test.
    """
    from scipy import stats  # slow

    difference = second - first
    n = len(difference)
    mean = float(difference.mean())
    stderr = float(difference.std(ddof=1) / math.sqrt(n)) if n > 1 else math.nan
    if set(np.unique([first, second])) <= {0.0, 1.0}:
        only_second, only_first = int((difference > 0).sum()), int((difference < 0).sum())
        discordant = only_first + only_second
        p = stats.binomtest(only_first, discordant).pvalue if discordant else 1.0
        return Compared(mean, stderr, float(p), "McNemar", only_first, only_second)
    p = float(stats.ttest_rel(second, first).pvalue) if np.any(difference != mean) else float(mean == 0)
    return Compared(mean, stderr, p, "paired t", None, None)


def compare_pages(
    first: Float[np.ndarray, " N"], second: Float[np.ndarray, " N"], n_bytes: Float[np.ndarray, " N"]
) -> Compared:
    """Compares bits per byte of the same N documents, given their nats: the t-test of a ratio of sums.

    The difference is sum(second - first) / sum(bytes); its error that of the linearised ratio over documents.
    """
    from scipy import stats  # slow

    bits = (second - first) / math.log(2)
    ratio, stderr = ratio_of_sums(bits, n_bytes)
    p = float(2 * stats.t.sf(abs(ratio) / stderr, len(bits) - 1)) if stderr else float(ratio == 0)
    return Compared(ratio, stderr, p, "paired t over pages", None, None)


def compare_task(first: Path, second: Path, task: str, metrics: list[str]) -> dict[str, Compared]:
    """Every metric of a task that can be compared question by question.

    Raises:
        UserError: the two were not asked the same questions.
    """
    a, b = read_questions(first, task), read_questions(second, task)
    if a.keys() != b.keys():
        raise UserError(
            f"{first} and {second} were asked different questions in {task} ({len(a.keys() & b.keys())} of "
            f"{len(a)} and {len(b)} are the same): evaluate both with the same --limit, --shots and data"
        )
    compared = {}
    for metric in metrics:
        if "bytes" in next(iter(a.values())):
            if metric == "bits_per_byte":
                columns = ([-row["logprob"] for row in a.values()], [-b[key]["logprob"] for key in a])
                n_bytes = np.array([row["bytes"] for row in a.values()], float)
                compared[metric] = compare_pages(*map(np.array, columns), n_bytes)
            continue
        pairs = [(row.get(metric), b[key].get(metric)) for key, row in a.items()]
        if all(isinstance(value, int | float) for pair in pairs for value in pair):
            left, right = np.array(pairs, float).T
            compared[metric] = compare_values(left, right)
    return compared


def main() -> int:
    """The command."""
    config = cli.parse(CompareConfig, prog="python -m eval.compare")
    if len(config.models) < 2:
        raise UserError("give at least two models to compare")
    folders = [evaluated_folder(path) for path in config.models]
    contents = [read_results(folder) for folder in folders]
    text = report(folders, contents)
    print(text)
    if config.out:
        write_atomically(config.out, text + "\n")
        print(f"wrote {config.out}")
    return 0


def report(folders: list[Path], contents: list[dict[str, Any]]) -> str:
    """The tables: all scores, then every model against the first."""
    names = unique_names([content["model"]["name"] for content in contents])
    tasks = [all_tasks(content) for content in contents]
    shared = [task for task in tasks[0] if all(task in others for others in tasks)]
    if not shared:
        raise UserError(f"{names[0]} and the others have no task in common: evaluate them on the same tasks")
    rows = [
        (task, metric, *(cell(others[task], metric) for others in tasks), protocol(tasks[0][task]))
        for task in shared
        for metric, *_ in figures(tasks[0][task])
    ]
    parts = [table(("task", "metric", *names, "protocol"), rows)]
    differing = {task for task in shared if len({protocol(others[task]) for others in tasks}) > 1}
    if differing:
        parts.append(
            "Measured under different settings (dtype, shots, questions, truncation): "
            f"{', '.join(sorted(differing))}."
        )
    n_tests, not_compared = 0, []
    for name, folder, others in list(zip(names, folders, tasks, strict=True))[1:]:
        rows = []
        for task in shared:
            metrics = [metric for metric, *_ in figures(others[task])]
            try:
                compared = compare_task(folders[0], folder, task, metrics)
            except UserError as error:  # of this task; the others may do
                not_compared.append(str(error))
                continue
            for metric, found in compared.items():
                n_tests += 1
                rows.append((task, metric, *compared_cells(metric, found)))
        if not rows:
            continue
        parts.append(f"{name} against {names[0]}, on the same questions:")
        parts.append(
            table(("task", "metric", "difference", f"right only: {names[0]} / {name}", "p", "test"), rows)
        )
    if not n_tests and not_compared:
        raise UserError(not_compared[0])
    parts += [f"Not compared: {reason}." for reason in not_compared]
    parts.append(
        "± is one standard error, of differences over the questions. The p values are not corrected for "
        f"multiple testing; number of tests: {n_tests}, of which {0.05 * n_tests:.1f} are expected below "
        "0.05 by chance. They cover the choice of questions, not the training seed."
    )
    return "\n\n".join(parts)


def unique_names(names: list[str]) -> list[str]:
    """The names, numbered where they are the same."""
    return [name if names.count(name) == 1 else f"{name} [{i}]" for i, name in enumerate(names, 1)]


def cell(entry: dict[str, Any], metric: str) -> str:
    """A metric's value with its error."""
    return next((shown(*figure) for figure in figures(entry) if figure[0] == metric), "")


def compared_cells(metric: str, found: Compared) -> tuple[str, ...]:
    """A comparison as cells of the table."""
    counts = "" if found.only_first is None else f"{found.only_first} / {found.only_second}"
    sign = "+" if found.difference > 0 else ""
    p = f"{found.p:.1e}" if found.p < 1e-3 else f"{found.p:.3f}"
    return sign + shown(metric, found.difference, found.stderr), counts, p, found.test


if __name__ == "__main__":
    run_command(main)
