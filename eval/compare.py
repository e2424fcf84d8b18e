"""`python -m eval.compare A B ...`: results side by side, with the significance of each difference.

`--a RUN RUN ... --b RUN RUN ...` compares two recipes by several training seeds of each (`eval.recipes`).

Models that answered the same questions are compared question by question: the questions' own difficulty, most
of the spread of a score, cancels. So a difference far below two standard errors of the scores may be clear,
and one above may be luck. Each model is compared with the first.
"""

import dataclasses
import math
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import tyro
from jaxtyping import Float

from core import cli
from core.errors import UserError, run_command
from core.folders import require_place, write_atomically
from eval.questions import Seen, evaluated_folder, read_scores
from eval.ratio import ratio_of_sums
from eval.recipe_report import recipe_report
from eval.results import (
    UNCORRECTED,
    Record,
    all_tasks,
    figures,
    measured_differently,
    multiple_tests,
    p_shown,
    protocol,
    read_results,
    require_shared,
    shown,
    signed,
    table,
    unique_names,
)


@dataclasses.dataclass(frozen=True)
class CompareConfig:
    """Compare evaluated models: two growths, an ablation with its base, a checkpoint with its export; or two
    recipes, by several training seeds of each."""

    models: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="MODEL...")] = ()
    """Two or more that eval.run has evaluated: runs, exported folders, or folders of results."""
    a: Annotated[tuple[Path, ...] | None, tyro.conf.arg(metavar="RUN...")] = None
    """Instead of models: runs of one recipe, alike but for --seed. At least two, better four."""
    b: Annotated[tuple[Path, ...] | None, tyro.conf.arg(metavar="RUN...")] = None
    """Runs of the other recipe."""
    without_overlap: Annotated[tuple[Path, ...] | None, tyro.conf.arg(metavar="DATA...")] = None
    """Leave out questions that share 13 words in a row with the training text: the prepared data of every
    model, made with --overlap count --eval-items FILE."""
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


def compare_values(first: Float[np.ndarray, " N"], second: Float[np.ndarray, " N"]) -> Compared:
    """Compares a score of the same N questions, at least two.

    Right or wrong: McNemar's exact test, which asks only of the questions that one model alone gets right. A
    share (mc2): the paired t-test.
    """
    from scipy import stats  # slow

    difference = second - first
    mean = float(difference.mean())
    stderr = float(difference.std(ddof=1) / math.sqrt(len(difference)))
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
    """Compares bits per byte of the same N documents, given their bits: the t-test of a ratio of sums.

    The difference is sum(second - first) / sum(bytes); its error that of the linearized ratio over documents,
    of which there are at least two.
    """
    from scipy import stats  # slow

    ratio, stderr = ratio_of_sums(second - first, n_bytes)
    p = float(2 * stats.t.sf(abs(ratio) / stderr, len(first) - 1)) if stderr else float(ratio == 0)
    return Compared(ratio, stderr, p, "paired t over pages", None, None)


def compare_task(
    first: Path, second: Path, task: str, metrics: list[str], seen: Seen | None = None
) -> tuple[dict[str, Compared], str]:
    """Every metric of a task that can be compared question by question, and which questions were left out.

    Raises:
        UserError: the two were not asked the same questions, or fewer than two are left.
    """
    scores, left_out = read_scores([first, second], task, metrics, seen)
    compared = {
        metric: compare_values(*values) if weights is None else compare_pages(*values, weights)
        for metric, (values, weights) in scores.items()
    }
    return compared, left_out


def main() -> int:
    """The command."""
    config = cli.parse(CompareConfig, prog="python -m eval.compare")
    check_models(config)
    if config.out:
        require_report(config.out)
    paths = [*config.models, *(config.a or ()), *(config.b or ())]
    folders = [evaluated_folder(path) for path in paths]
    contents = [read_results(folder) for folder in folders]
    seen = None if config.without_overlap is None else Seen(config.without_overlap, contents)
    if config.models:
        text = report(folders, contents, seen)
    else:
        text = recipe_report(folders, contents, len(config.a), seen)
    print(text)
    if config.out:
        write_atomically(config.out, text + "\n")
        print(f"wrote {config.out}")
    return 0


def require_report(out: Path) -> None:
    """A UserError if a comparison cannot be written there, or would replace what is none."""
    require_place(out.parent)
    if out.is_dir():
        raise UserError(f"{out} is a folder: name a file")
    if out.exists() and UNCORRECTED.encode() not in out.read_bytes():
        raise UserError(f"{out} exists and is no comparison: name another file, or remove it first")


def check_models(config: CompareConfig) -> None:
    """A UserError unless there are models to compare, or two recipes with seeds that can be told apart."""
    if config.a is None and config.b is None:
        if len(config.models) < 2:
            raise UserError("give at least two models to compare, or runs of two recipes with --a and --b")
    elif config.models:
        raise UserError(
            f"{config.models[0]} belongs to no recipe: give models to compare with the first, or runs of two "
            "recipes with --a and --b"
        )
    for side, runs in (("a", config.a), ("b", config.b)):
        if not config.models and len(runs or ()) < 2:
            raise UserError(
                f"--{side} has {'one run' if runs else 'no run'}, which does not show how much the recipe "
                "varies from seed to seed: give two or more, trained with different --seed, or name single "
                "models without --a and --b to compare these"
            )
    if config.without_overlap == ():
        raise UserError("--without-overlap needs the prepared data that the models were trained on")


def report(folders: list[Path], contents: list[Record], seen: Seen | None = None) -> str:
    """The tables: all scores, then every model against the first, without the questions that were `seen`.

    Raises:
        UserError: no task can be compared.
    """
    names = unique_names([content["model"]["name"] for content in contents])
    tasks = [all_tasks(content) for content in contents]
    shared = require_shared(names, tasks)
    rows = [
        (task, metric, *(cell(others[task], metric) for others in tasks), protocol(tasks[0][task]))
        for task in shared
        for metric, *_ in figures(tasks[0][task])
    ]
    parts = [table(("task", "metric", *names, "protocol"), rows)]
    parts += measured_differently(shared, tasks)
    n_tests, not_compared, left_out = 0, [], {}
    for name, folder, others in list(zip(names, folders, tasks, strict=True))[1:]:
        rows = []
        for task in shared:
            metrics = [metric for metric, *_ in figures(others[task])]
            try:
                compared, left_out[task] = compare_task(folders[0], folder, task, metrics, seen)
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
    if seen is not None:
        parts += [*left_out.values(), "The table of scores has all questions.", *seen.notes]
    parts.append(
        f"± is one standard error, of differences over the questions. {multiple_tests(n_tests)} "
        "They cover the choice of questions, not the training seed."
    )
    return "\n\n".join(parts)


def cell(entry: Record, metric: str) -> str:
    """A metric's value with its error."""
    return next((shown(*figure) for figure in figures(entry) if figure[0] == metric), "")


def compared_cells(metric: str, found: Compared) -> tuple[str, ...]:
    """A comparison as cells of the table."""
    counts = "" if found.only_first is None else f"{found.only_first} / {found.only_second}"
    return signed(metric, found.difference, found.stderr), counts, p_shown(found.p), found.test


if __name__ == "__main__":
    run_command(main)
