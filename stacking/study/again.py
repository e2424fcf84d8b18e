"""Runs that the guard halted, to be trained again: they count as ended otherwise."""

import math
import shutil
from collections.abc import Sequence
from pathlib import Path

from core.errors import UserError
from stacking.study.results import Results
from stacking.study.runs import Run


def forget(names: Sequence[str], leaves: list[Run], results: Results) -> list[Run]:
    """Takes halted runs out of the results, in memory; where a trunk was halted, all that branches off it.

    Returns:
        The runs whose folders must go before they are trained again (`remove`).

    Raises:
        UserError: the guard halted none of that name.
    """
    halted = {leaf.name: leaf for leaf in leaves if results.runs.get(leaf.name, {}).get("halted")}
    for name in names:
        if name not in halted:
            those = ", ".join(halted) or "none"
            raise UserError(f"--again {name}: the guard halted no run of this name; halted: {those}")
    # Results of 2026-11-30 and before do not say at which step.
    roots = {halted[name].of_step(results.runs[name].get("halted_at", math.inf)).name for name in names}
    gone = [
        run
        for leaf in halted.values()
        for run in leaf.ancestry
        if any(one.name in roots for one in run.ancestry)
    ]
    for run in gone:
        results.runs.pop(run.name, None)
    return list({run.name: run for run in gone}.values())


def remove(runs: list[Run], out: Path, results: Results) -> None:
    """Their folders, and what the file of results has of them."""
    for run in runs:
        shutil.rmtree(out / run.name, ignore_errors=True)
    if runs:
        results.save()
