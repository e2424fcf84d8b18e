"""The report of a study, made of its results alone: a table in Markdown and a picture."""

import math
from pathlib import Path
from types import ModuleType

from core.errors import UserError
from core.folders import write_atomically, write_picture
from stacking.study import growth_report, saturation, tuning
from stacking.study.results import PICTURE, TABLE, Results

WIDTH = 10
"""Of a plot, in inches."""
REPORTS: dict[str, ModuleType] = {"tuning": tuning, "saturation": saturation, "growth": growth_report}


def write_report(results: Results) -> str:
    """Writes the table and the plot next to the results; returns what is to be said."""
    path, record = results.path, results.record
    ended = [entry for entry in results.runs.values() if "losses" in entry]
    if not ended:
        halted = [name for name, entry in results.runs.items() if entry["halted"]]
        said = f" (the guard halted {', '.join(halted)})" if halted else ""
        return f"{path} holds no run with a loss yet{said}, so there is nothing to report"
    heldout = record["heldout"] or next(iter(ended[0]["losses"]))
    for name, entry in results.runs.items():
        if heldout not in entry.get("losses", {heldout}):
            raise UserError(
                f"{path} has {name} without a loss on {heldout}, on which the study compares runs: name a "
                "set as heldout that all have, or remove that run from the file"
            )
    kind = REPORTS[record["kind"]]
    table = f"{kind.table(results, heldout)}\n\n{len(ended)} runs; {describe_sessions(results)}"
    tables, picture = path.with_suffix(TABLE), path.with_suffix(PICTURE)
    write_atomically(tables, f"{table}\n")
    draw(kind, results, heldout, picture)
    return f"{table}\n\ntable: {tables}; plot: {picture}; all figures: {path}"


def draw(kind: ModuleType, results: Results, heldout: str, path: Path) -> None:
    """The plot of a kind of study."""
    from matplotlib.figure import Figure

    figure = Figure(layout="constrained")
    axes = figure.subplots()
    kind.plot(results, heldout, axes)
    axes.set_ylabel(f"{heldout}, nats per token")
    axes.grid(alpha=0.25)
    _, labels = axes.get_legend_handles_labels()
    longest = max(map(len, labels), default=0)
    columns = max(1, int(WIDTH / (0.9 + 0.08 * longest)))  # inches: a line's sample, and its letters
    figure.set_size_inches(WIDTH, 6 + 0.21 * math.ceil(len(labels) / columns))
    if labels:
        figure.legend(loc="outside lower center", ncols=columns, frameon=False)
    write_picture(figure, path, dpi=130)


def describe_sessions(results: Results) -> str:
    """When, by which code and on what the runs were trained."""
    devices = dict.fromkeys(entry["device"] for entry in results.runs.values() if entry.get("device"))
    sessions = results.record["sessions"]
    when = dict.fromkeys(
        f"{session['date']}, commit {session['commit'] or 'unknown'}" for session in sessions
    )
    return f"trained on {', '.join(devices) or 'an unknown device'} ({'; '.join(when)})."
