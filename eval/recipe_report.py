"""What `python -m eval.compare --a RUN ... --b RUN ...` says: the runs of two recipes, and the table."""

from collections.abc import Sequence
from pathlib import Path

from core.errors import UserError
from eval.questions import Seen, read_scores
from eval.recipes import LEVEL, POWER, Difference, compare_recipes
from eval.results import (
    Record,
    all_tasks,
    figures,
    measured_differently,
    multiple_tests,
    p_shown,
    protocol,
    require_shared,
    shown,
    signed,
    table,
    unique_names,
)

EXPLANATION = (
    "A and B: mean over the runs (standard deviation between them). B - A ± one standard error, over seeds "
    "and questions. df: degrees of freedom of its part that is due to seeds; interval and p value allow for "
    "them. From seeds: the part of its variance that more seeds reduce. Seeds needed: runs of each recipe "
    f"for {POWER:.0%} power at {LEVEL:.0%}, if difference and variances are as estimated; none: no number of "
    "runs suffices, as there are too few questions."
)


def recipe_report(folders: list[Path], contents: list[Record], n_a: int, seen: Seen | None) -> str:
    """The table of two recipes, the first `n_a` results being those of A.

    Raises:
        UserError: runs that are not so many independent ones, or nothing that can be compared.
    """
    names = unique_names([content["model"]["name"] for content in contents])
    _require_independent(names, contents, n_a)
    tasks = [all_tasks(content) for content in contents]
    rows, left_out, not_compared = [], [], []
    shared = require_shared(names, tasks)
    for task in shared:
        metrics = [metric for metric, *_ in figures(tasks[0][task])]
        try:
            _require_one_protocol(task, names, [entries[task] for entries in tasks])
            scores, sentence = read_scores(folders, task, metrics, seen)
            if not scores:
                raise UserError(f"{task} has no metric that is made of a value of each question")
            found = {
                metric: compare_recipes(values[:n_a], values[n_a:], weights)
                for metric, (values, weights) in scores.items()
            }
        except UserError as error:  # of this task; the others may do
            not_compared.append(str(error))
            continue
        left_out.append(sentence)
        how = protocol(tasks[0][task])
        rows += [(task, metric, *_cells(metric, difference), how) for metric, difference in found.items()]
    if not rows:
        raise UserError(not_compared[0])
    columns = ("A", "B", "B - A", "95% interval", "p", "df", "from seeds", "seeds needed", "protocol")
    return "\n\n".join([
        *_recipes(names, contents, n_a),
        *_common_starts(names, contents),
        table(("task", "metric", *columns), rows),
        *measured_differently(shared, tasks),
        *(f"Not compared: {reason}." for reason in not_compared),
        *filter(None, left_out),
        *(seen.notes if seen else []),
        EXPLANATION,
        multiple_tests(len(rows)),
    ])  # fmt: skip


def _require_independent(names: Sequence[str], contents: Sequence[Record], n_a: int) -> None:
    """A UserError where a model stands for two runs, or runs of a recipe have the same seed."""
    for i, content in enumerate(contents):
        for j, other in enumerate(contents[:i]):
            if content["model"]["sha256"] == other["model"]["sha256"]:
                where = "both recipes" if j < n_a <= i else "a recipe"
                raise UserError(
                    f"{names[j]} and {names[i]} are the same model (sha256 {other['model']['sha256'][:12]}), "
                    f"given as two runs of {where}: give each run once"
                )
            seeds = [_training(model).get("seed") for model in (content, other)]
            if (i < n_a) == (j < n_a) and seeds[0] is not None and seeds[0] == seeds[1]:
                raise UserError(
                    f"{names[j]} and {names[i]} both have --seed {seeds[0]}, and do not show how much the "
                    "recipe varies from seed to seed: give runs of different seeds"
                )


def _training(content: Record) -> Record:
    """What the results say of the model's training; nothing where it is not known."""
    return content["model"].get("training") or {}


def _recipes(names: Sequence[str], contents: Sequence[Record], n_a: int) -> list[str]:
    """The runs of each recipe with their seeds, and what else differs between them."""
    lines = []
    for side, part in (("A", slice(n_a)), ("B", slice(n_a, None))):
        trained = [_training(content) for content in contents[part]]
        runs = ", ".join(names[part])
        if not all("settings" in training for training in trained):
            lines.append(
                f"{side}: {runs}. Their results do not record how they were trained, so that they differ in "
                "the seed alone is not checked."
            )
            continue
        line = f"{side}: {runs} (seeds {', '.join(str(training['seed']) for training in trained)})"
        settings = [{**training["settings"], "data": training["data"]} for training in trained]
        every = dict.fromkeys(name for one in settings for name in one)
        differing = [
            name for name in every if any(one.get(name) != settings[0].get(name) for one in settings)
        ]
        if differing:
            line += f". They differ in more than the seed: {', '.join(differing)}"
        lines.append(line)
    return lines


def _common_starts(names: Sequence[str], contents: Sequence[Record]) -> list[str]:
    """A sentence for every model that several runs began with: its seed is one, however many theirs are."""
    runs: dict[str, list[str]] = {}
    for name, content in zip(names, contents, strict=True):
        if start := _training(content).get("began_with"):
            runs.setdefault(start, []).append(name)
    return [
        f"{', '.join(found)} all began with {start}: how much they would vary with another start is not in "
        "the interval."
        for start, found in runs.items() if len(found) > 1
    ]  # fmt: skip


def _require_one_protocol(task: str, names: Sequence[str], entries: Sequence[Record]) -> None:
    """A UserError where runs were not evaluated alike."""
    protocols = [
        {"version": entry["version"], "shots": entry["shots"]}
        | {name: entry["settings"].get(name) for name in ("dtype", "lm_eval")}
        for entry in entries
    ]
    for name, settings in zip(names, protocols, strict=True):
        if settings != protocols[0]:
            key = next(key for key, value in settings.items() if value != protocols[0][key])
            raise UserError(
                f"{task} was evaluated with {key} {protocols[0][key]} for {names[0]} and {settings[key]} for "
                f"{name}: evaluate all runs alike"
            )


def _cells(metric: str, found: Difference) -> tuple[str, ...]:
    means = [
        f"{shown(metric, mean, None)} ({shown(metric, spread, None)})"
        for mean, spread in zip(found.means, found.spreads, strict=True)
    ]
    low, high = (signed(metric, end, None) for end in found.interval)
    share = "" if found.seed_share != found.seed_share else f"{found.seed_share:.0%}"  # nan: no variance
    needed = "none" if found.seeds_needed is None else f"{found.seeds_needed:,}"
    needed = needed if found.difference else ""
    return (
        *means, signed(metric, found.difference, found.stderr), f"{low} to {high}", p_shown(found.p),
        f"{found.seed_df:.1f}", share, needed,
    )  # fmt: skip
