"""What an evaluation leaves: results.json, the scored questions, a table with published figures, a plot.

OUT/results.json           model, settings and versions; every task with its metrics, hashes and counts
OUT/questions/TASK.jsonl   every question as it was scored, for eval.compare
OUT/results.md, results.png
OUT/perplexity.json        of eval.perplexity
"""

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from core.checkpoint.manifest import code_version, package_versions
from core.errors import UserError
from core.folder_kinds import Kind, kind_of
from core.folders import require_place, write_atomically, write_picture
from core.locks import hold_file
from eval.published import NOTE, PUBLISHED, PUBLISHED_TASKS, PUBLISHED_WIKITEXT

FORMAT = 1
RESULTS = "results.json"
PERPLEXITIES = "perplexity.json"
# What is shown first of a task: harness's metric names.
ACCURACIES = ("acc", "acc_norm")
SHOWN = (*ACCURACIES, "exact_match", "perplexity", "word_perplexity", "bits_per_byte")
UNCORRECTED = "The p values are not corrected for multiple testing"  # every comparison says it
LOGARITHMIC = ("bits_per_byte", "log perplexity")
Record = dict[str, Any]


class Results:
    """The results of one model in a folder; every `add` writes them, so nothing is lost when it stops."""

    def __init__(self, folder: Path, identity: Record, settings: Record):
        """Opens what is there of the same model.

        Raises:
            UserError: see `require_own_results`.
        """
        require_own_results(folder, identity)
        self.folder = folder
        self.content: Record = {"format": FORMAT, "model": identity, "evaluations": {}}
        self.settings = settings
        if (folder / RESULTS).exists():
            self.content = read_results(folder)

    def has(self, name: str, files: Callable[[str], dict[str, str]]) -> bool:
        """Whether that task or group was evaluated under the same settings and on the same data.

        files: sha256 of the local files of a single task.
        """
        done = self.content["evaluations"].get(name)
        if done is None or done["settings"] != self.settings or "replaced" in done:
            return False
        return all(
            entry["files_sha256"] == files(task) and _count_lines(self.folder, task) == entry["questions"]
            for task, entry in done["tasks"].items()
        )

    def add(self, name: str, record: Record, questions: dict[str, list[Record]]) -> None:
        """Takes up a task or group just evaluated, in place of an earlier evaluation of it.

        A group of which one task was evaluated anew under other settings keeps the others, and is no longer
        taken for evaluated.
        """
        evaluations = self.content["evaluations"]
        if self._forget(name, record["tasks"]):  # before their questions are replaced
            write_atomically(self.folder / RESULTS, json.dumps(self.content, indent=1) + "\n")
        for task, rows in questions.items():
            text = "".join(json.dumps(row, default=str) + "\n" for row in rows)
            write_atomically(questions_file(self.folder, task), text)
        stamp = {
            "settings": self.settings,
            "versions": versions(),
            "date": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        }
        evaluations[name] = stamp | record
        write_atomically(self.folder / RESULTS, json.dumps(self.content, indent=1) + "\n")

    def _forget(self, name: str, tasks: Record) -> bool:
        """Forgets what is there of tasks that were evaluated anew; whether there was anything."""
        evaluations = self.content["evaluations"]
        forgotten = evaluations.pop(name, None) is not None
        for other, done in list(evaluations.items()):
            replaced = [
                task
                for task in done["tasks"].keys() & tasks.keys()
                if done["settings"] != self.settings
                or done["tasks"][task]["files_sha256"] != tasks[task]["files_sha256"]
            ]
            if not replaced:
                continue
            forgotten = True
            left = {task: entry for task, entry in done["tasks"].items() if task not in replaced}
            evaluations[other] = done | {"tasks": left, "groups": {}, "replaced": sorted(replaced)}
            if not left:
                del evaluations[other]
        return forgotten

    def finish(self) -> None:
        """Writes table and plot of everything in the folder."""
        write_atomically(self.folder / "results.md", markdown(self.content))
        plot(self.content, self.folder / "results.png")


def read_results(folder: Path) -> Record:
    """The results in a folder; a UserError where there are none or they are not ours."""
    path = folder / RESULTS
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"{folder} holds no {RESULTS}: evaluate the model first (python -m eval.run)"
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}): remove it and evaluate again") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UserError(f"{path} is not of this version's format ({FORMAT}): remove it and evaluate again")
    return content


def read_perplexities(folder: Path) -> dict[str, Record]:
    """The perplexities in a folder, by the names of their texts; none where there is no file.

    Raises:
        UserError: it is damaged.
    """
    path = folder / PERPLEXITIES
    try:
        there = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(there, dict):
            raise ValueError("it is not an object")
        for entry in there.values():
            entry["model"]["sha256"], entry["model"]["name"]
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path} cannot be read ({error}): remove it and measure again") from None
    return there


def require_own_results(folder: Path, identity: Record) -> None:
    """Refuses a folder for the results of a model that is not for them.

    Raises:
        UserError: it holds those of another model or a damaged file, is a run, a model or data, or cannot be
            written.
    """
    require_place(folder)
    kind = kind_of(folder)
    if kind is not Kind.OTHER:
        raise UserError(
            f"{folder} is {kind.value}, and results have a folder of their own: give another --out"
        )
    models = [entry["model"] for entry in read_perplexities(folder).values()]
    if (folder / RESULTS).exists():
        models.append(read_results(folder)["model"])
    for model in models:
        if model["sha256"] != identity["sha256"]:
            raise UserError(
                f"{folder} holds the results of another model ({model['name']}, sha256 "
                f"{model['sha256'][:12]}): give another --out"
            )


@contextlib.contextmanager
def hold_results(folder: Path, file: str, identity: Record) -> Iterator[None]:
    """Keeps a file of a model's results for this process, which reads it and will replace it.

    Raises:
        UserError: another process has it; or as `require_own_results`.
    """
    require_own_results(folder, identity)
    taken = f"another process evaluates into {folder}: wait until it ends, or give another --out"
    with hold_file(folder / file, taken):
        yield


def questions_file(folder: Path, task: str) -> Path:
    """Where a folder of results keeps the scored questions of a task."""
    return folder / "questions" / f"{task}.jsonl"


def _count_lines(folder: Path, task: str) -> int | None:
    """Lines of a task's file of questions; None where there is none."""
    file = questions_file(folder, task)
    return file.read_bytes().count(b"\n") if file.is_file() else None


def versions() -> Record:
    """Versions of everything that may change a number."""
    return code_version() | package_versions("lm_eval", "datasets", "torch", "transformers")


def all_tasks(content: Record) -> dict[str, Record]:
    """Every single task in the results, each with its settings."""
    return {
        task: entry | {"settings": evaluation["settings"], "truncated": evaluation["truncated"]}
        for evaluation in content["evaluations"].values()
        for task, entry in evaluation["tasks"].items()
    }


def figures(entry: Record) -> list[tuple[str, float, float | None]]:
    """(metric, value, standard error) of a task, those that are shown."""
    metrics = entry["metrics"]
    names = [name for name in SHOWN if name in metrics] or list(metrics)
    stderrs = {"bits_per_byte": entry.get("bits_per_byte_stderr")}
    return [(name, metrics[name]["value"], stderrs.get(name) or metrics[name]["stderr"]) for name in names]


def shown(metric: str, value: float, stderr: float | None) -> str:
    """A figure with its error: accuracies in percent."""
    percent = metric.startswith(("acc", "exact_match"))
    scale, digits = (100, 2) if percent else (1, 4 if metric in LOGARITHMIC else 2)
    error = "" if stderr is None else f" ± {scale * stderr:.{digits}f}"
    return f"{scale * value:.{digits}f}{error}"


def signed(metric: str, difference: float, stderr: float | None) -> str:
    """A difference with its error: as `shown`, with its sign."""
    return ("+" if difference > 0 else "") + shown(metric, difference, stderr)


def p_shown(p: float) -> str:
    """A p value."""
    return f"{p:.1e}" if p < 1e-3 else f"{p:.3f}"


def multiple_tests(n: int) -> str:
    """What is to be said of n p values."""
    return f"{UNCORRECTED}; number of tests: {n}, of which {0.05 * n:.1f} are expected below 0.05 by chance."


def unique_names(names: list[str]) -> list[str]:
    """The names, numbered where they are the same."""
    return [name if names.count(name) == 1 else f"{name} [{i}]" for i, name in enumerate(names, 1)]


def require_shared(names: list[str], tasks: list[dict[str, Record]]) -> list[str]:
    """The tasks that all models were evaluated on, given those of each; a UserError where there is none."""
    shared = [task for task in tasks[0] if all(task in others for others in tasks)]
    if not shared:
        raise UserError(f"{names[0]} and the others have no task in common: evaluate them on the same tasks")
    return shared


def measured_differently(shared: list[str], tasks: list[dict[str, Record]]) -> list[str]:
    """A sentence that names the tasks of which the models' protocols differ; nothing where none does."""
    differing = {task for task in shared if len({protocol(others[task]) for others in tasks}) > 1}
    names = ", ".join(sorted(differing))
    return [f"Measured under different settings (dtype, shots, questions, truncation): {names}."] * bool(
        names
    )


def questions(entry: Record) -> str:
    """How many questions a figure stands on."""
    n, of = entry["questions"], entry["of"]
    return f"{n:,} questions" if n == of else f"ONLY {n:,} of {of:,} questions"


def protocol(entry: Record) -> str:
    """How a task was measured, in a few words."""
    settings = entry["settings"]
    part = "" if entry["questions"] == entry["of"] else f", ONLY {entry['questions']} of {entry['of']}"
    cut = f", {entry['truncated']} truncated" if entry["truncated"] else ""
    return f"v{entry['version']}, {entry['shots']}-shot, {settings['dtype']}{part}{cut}"


def markdown(content: Record) -> str:
    """The results as a page: this model, then the published rows."""
    model, tasks = content["model"], all_tasks(content)
    step = f" at step {model['step']:,} ({model['tokens']:,} tokens)" if "step" in model else ""
    lines = [
        f"# {model['name']}",
        f"{model['parameters']:,} parameters{step}; {model['kind']} sha256 `{model['sha256'][:16]}`. "
        "lm-evaluation-harness's own tasks; every text begins with the tokenizer's bos, if it has one. ± is "
        "one standard error.",
        table(
            ("task", "metric", "value", "chance", "questions", "protocol"),
            [
                (
                    task,
                    metric,
                    shown(metric, value, stderr),
                    chance(metric, entry),
                    f"{entry['questions']:,}",
                    protocol(entry),
                )
                for task, entry in tasks.items()
                for metric, value, stderr in figures(entry)
            ]
            + [
                (f"{group} (group)", metric, shown(metric, value, stderr), "", "", "")
                for evaluation in content["evaluations"].values()
                for group, entry in evaluation["groups"].items()
                for metric, value, stderr in figures(entry)
            ],
        ),
    ]
    rolling = {task: entry for task, entry in tasks.items() if "bos_nats" in entry}
    for task, entry in rolling.items():
        said = f"{task}: {entry['words']:,} words and {entry['bytes']:,} bytes of the original text."
        if entry["bos_nats"]:
            said += (
                " As the harness does with a tokenizer that adds bos, P(bos | bos) is scored once per "
                f"document; without it {entry['word_perplexity_without_bos']:.2f} per word, "
                f"{entry['bits_per_byte_without_bos']:.4f} bits per byte."
            )
        lines.append(said)
    lines += compared_with_published(model["name"], tasks)
    return "\n\n".join(lines) + "\n"


def compared_with_published(name: str, tasks: dict[str, Record]) -> list[str]:
    """The section of a page with published figures, which are of all questions: tasks of which fewer were
    asked are named and left out. Nothing where there is nothing to compare.

    name: of the model.
    """
    of_others = {task: entry for task, entry in tasks.items() if task in (*PUBLISHED_TASKS, "wikitext")}
    whole = {task: entry for task, entry in of_others.items() if entry["questions"] == entry["of"]}
    lines = [published_table(name, whole), NOTE] if whole else []
    if parts := [f"{task} ({questions(of_others[task])})" for task in of_others if task not in whole]:
        lines.append(f"Not compared, since published figures are of all questions: {', '.join(parts)}.")
    return ["## Compared with published figures", *lines] if lines else []


def chance(metric: str, entry: Record) -> str:
    """What guessing gives, where that is known."""
    guess = entry["chance"]
    return "" if guess is None or metric not in ACCURACIES else f"{100 * guess:.1f}"


def published_table(name: str, tasks: dict[str, Record]) -> str:
    """Our model's tasks above those of others: acc / acc_norm in percent."""
    columns = [task for task in PUBLISHED_TASKS if task in tasks]
    cells = [pair(*(tasks[t]["metrics"].get(m, {}).get("value") for m in ("acc", "acc_norm")), 100)
             for t in columns]  # fmt: skip
    protocols = sorted({protocol(entry).split(", ", 1)[1] for entry in tasks.values()})
    harness = sorted({f"lm-eval {entry['settings']['lm_eval']}" for entry in tasks.values()})
    rows = [(f"**{name}**", *cells, wikitext(tasks), f"{', '.join(harness)}, {'; '.join(protocols)}")]
    for row in PUBLISHED:
        if any(task in row.scores for task in columns):
            cells = [pair(*row.scores[t], 1) if t in row.scores else "" for t in columns]
            rows.append((row.model, *cells, "", row.protocol))
    if "wikitext" in tasks:
        rows += [
            (model, *[""] * len(columns), f"{figure}: {bits}", "published")
            for model, figure, bits in PUBLISHED_WIKITEXT
        ]
    return table(("model", *columns, "WikiText-2", "protocol"), rows)


def pair(acc: float | None, acc_norm: float | None, scale: float) -> str:
    """acc / acc_norm."""
    cells = ["-" if value is None else f"{scale * value:.1f}" for value in (acc, acc_norm)]
    return cells[0] if cells[1] == "-" else " / ".join(cells)


def wikitext(tasks: dict[str, Record]) -> str:
    """The two figures of WikiText-2 that name their unit."""
    if "wikitext" not in tasks:
        return ""
    word, byte = (tasks["wikitext"]["metrics"][m]["value"] for m in ("word_perplexity", "bits_per_byte"))
    return f"{word:.2f} per word: {byte:.4f} bits per byte"


def table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A Markdown table."""
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, ("---",) * len(header), *rows))


def plot(content: Record, path: Path) -> None:
    """Accuracies with their errors next to the published ones, one panel per task; nothing without one.

    A panel says on how many questions its figure stands; published figures, which are of full sets, are not
    put next to one of a part.
    """
    from matplotlib.figure import Figure

    tasks = all_tasks(content)
    panels = [(task, m) for task, entry in tasks.items() for m in ACCURACIES if m in entry["metrics"]]
    if not panels:
        return
    n_columns = min(4, len(panels))
    n_rows = -(-len(panels) // n_columns)
    figure = Figure(figsize=(3.4 * n_columns, 2.9 * n_rows), layout="constrained")
    axes = figure.subplots(n_rows, n_columns, squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    for axis, (task, metric) in zip(axes.flat, panels, strict=False):
        entry = tasks[task]
        value, error = (entry["metrics"][metric][key] for key in ("value", "stderr"))
        others = [
            (row.model, row.scores[task][metric == "acc_norm"]) for row in PUBLISHED
            if entry["questions"] == entry["of"] and row.metric_stated and task in row.scores
            and row.scores[task][metric == "acc_norm"] is not None
        ]  # fmt: skip
        names = [content["model"]["name"], *(name for name, _ in others)]
        values = [100 * value, *(other for _, other in others)]
        errors = [100 * (error or 0), *[0] * len(others)]
        heights = range(len(names))[::-1]
        axis.errorbar(values[1:], heights[1:], fmt="o", color="#6b7280", markersize=4)
        axis.errorbar(values[:1], heights[:1], xerr=errors[:1], fmt="o", color="#1f4e8c", capsize=3)
        if entry["chance"] is not None:
            axis.axvline(100 * entry["chance"], color="#c2410c", linestyle=":", linewidth=1)
            axis.set_xlabel(f"dotted: chance, {100 * entry['chance']:.1f}", fontsize=7)
        axis.set_yticks(list(heights), names, fontsize=7)
        axis.set_ylim(-0.6, len(names) - 0.4)
        whole = entry["questions"] == entry["of"]
        title, color = f"{task} {metric}, %\n{questions(entry)}", "black" if whole else "#c2410c"
        axis.set_title(title, fontsize=9, color=color)
        axis.tick_params(axis="x", labelsize=7)
        axis.grid(alpha=0.25)
    write_picture(figure, path, dpi=130)
