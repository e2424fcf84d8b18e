"""A study from its file to its report: what is asked for, what it costs, train, keep the results."""

import contextlib
import dataclasses
import functools
import json
import os
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

from rich.console import Console

from core import cli
from core.checkpoint.manifest import digest
from core.data.batches import Data, data_record
from core.data.dataset import TRAIN
from core.data.mixture import Mixture
from core.errors import UserError, noted
from core.folders import require_place
from core.locks import hold_file
from core.run.data import is_ready, open_data
from core.run.folder import hold_place
from core.run.log import CARRIED, read_log
from stacking.jobs import Budget, Job, run_jobs, visible_gpus
from stacking.study import growth, saturation, tuning
from stacking.study.again import forget, remove
from stacking.study.config import StudyConfig
from stacking.study.definition import Definition, Settings, read_definition
from stacking.study.report import write_report
from stacking.study.results import (
    Results,
    Text,
    data_text,
    distinct_runs,
    open_results,
    read_results,
    require_results_file,
    require_same_folder,
    require_same_runs,
    require_same_text,
    speed,
    summarize,
    take_names,
)
from stacking.study.runs import Run, Runs, require_names

KINDS: dict[str, ModuleType] = {"tuning": tuning, "saturation": saturation, "growth": growth}
START = 30.0  # seconds that a process is expected to take besides its updates, until one has been measured


def run_study(config: StudyConfig, console: Console) -> None:
    """Trains what is missing of a study within its budget, and reports on what is there."""
    out = config.out or Path("studies") / Path(config.study).stem
    path = config.results or out / "results.json"
    if config.report:
        console.print(write_report(read_results(path)), highlight=False, soft_wrap=True)
        return
    definition = read_definition(config.study, config.data)
    require_place(out)
    require_results_file(path)
    with contextlib.nullcontext() if config.dry_run else hold(out, path):
        pursue(definition, config, out, path, console)


@contextlib.contextmanager
def hold(out: Path, path: Path) -> Iterator[None]:
    """Keeps the folder and the results of a study for this process: another one would know nothing of the
    runs that end here, and write the file without them.

    Raises:
        UserError: another process has one of them.
    """
    taken = f"another study adds to {path}: wait until it ends, or give another --results"
    with hold_place(out), hold_file(path, taken):
        yield


def pursue(definition: Definition, config: StudyConfig, out: Path, path: Path, console: Console) -> None:
    """Says what a study asks for and, but in a dry run, trains it in the folder `out`. path: its results."""
    say = functools.partial(console.print, highlight=False, soft_wrap=True)

    # 1. What is asked for, and what it costs.
    results = open_results(path, definition)
    leaves = open_runs(definition, results)
    anew = forget(config.again, leaves, results)
    gpus = visible_gpus(os.environ, config.gpus)
    at_once = config.jobs if config.jobs is not None else 2 if gpus else 1
    budget = Budget(config.minutes, config.flops)
    clock = Clock(at_once if gpus or config.dry_run else None)
    for line in describe(definition, leaves, results, config, out, clock, at_once, gpus):
        say(line)
    if config.dry_run:
        list_runs(leaves, out, results, clock, say)
        with noted(say):
            ready = [is_ready(data) for data in dict.fromkeys(run.settings.config.data for run in leaves)]
            if all(ready):
                open_all(definition, leaves, results, out)
        return
    leaves, texts = open_all(definition, leaves, results, out)

    # 2. Train. What is to be trained next may depend on the results.
    remove(anew, out, results)
    if any(run.name not in results.runs for run in leaves):
        results.begin()
    try:
        while True:
            runs = make_runs(out, leaves, results, clock, texts, config.keep_weights)
            whole = run_jobs(runs.jobs(), out, at_once, gpus, console, budget)
            leaves = open_runs(definition, results, texts)
            if not config.keep_weights:
                runs.remove_weights([*leaves, *coming(definition, results)])
            if not whole:
                say("the budget is spent: the same command trains the rest")
            if not whole or all(run.name in results.runs for run in leaves):
                break
    except UserError:  # of one run: the others have ended, and what they say is not held back
        report(results, say)
        raise
    report(results, say)


def report(results: Results, say: Callable[[str], None]) -> None:
    """Says what the results say; a study that was stopped early may have nothing to compare yet."""
    try:
        say(write_report(results))
    except UserError as error:
        say(f"no report yet: {error}")


def open_runs(definition: Definition, results: Results, texts: dict[str, Text] | None = None) -> list[Run]:
    """The runs whose results are wanted now, each once; entries get the names that the study gives them.

    texts: by `text_key`, once they are open.
    """
    leaves = KINDS[definition.kind].runs(definition, results)
    require_names(leaves)
    named = None if texts is None else texts_of(leaves, texts)
    leaves = distinct_runs(leaves, named)
    take_names(results, leaves, named)
    require_same_runs(results, leaves)
    return leaves


def open_all(
    definition: Definition, leaves: list[Run], results: Results, out: Path
) -> tuple[list[Run], dict[str, Text]]:
    """The texts of runs, and the runs as they are known by them.

    Raises:
        UserError: as `open_texts`, or there are results on another text.
    """
    texts = open_texts(leaves, definition.heldout, out)
    leaves = open_runs(definition, results, texts)
    require_same_text(results, leaves, texts_of(leaves, texts))
    return leaves, texts


def texts_of(leaves: list[Run], texts: dict[str, Text]) -> dict[str, Text]:
    """The texts of runs and of those that they come from, by their names."""
    return {run.name: texts[text_key(run.settings)] for leaf in leaves for run in leaf.ancestry}


def coming(definition: Definition, results: Results) -> list[Run]:
    """What may be wanted later."""
    return growth.possible(definition, results) if definition.kind == "growth" else []


def make_runs(
    out: Path,
    leaves: list[Run],
    results: Results,
    clock: "Clock",
    texts: dict[str, Text],
    keep_weights: bool,
) -> Runs:
    """The runs as jobs that keep their results; those that ended while nobody looked are kept at once.

    Raises:
        UserError: in the folder of one that has not ended lies another run.
    """

    def after(run: Run, seconds: float) -> None:
        folder = runs.folder(run)
        clock.measure(run, seconds, folder)
        entry = summarize(run, folder, texts[text_key(run.settings)], runs.halted_at(run, run.steps))
        before = results.runs.get(run.name, {}).get("seconds", 0)  # of a trunk, up to an earlier branch
        results.add(run, entry | {"seconds": round(before + seconds, 1)})
        if not (run.keep or keep_weights):  # nothing comes from it: the disk may be small
            runs.remove_weights_of(run.name)

    runs = Runs(out, leaves, lambda run: run.name in results.runs and not run.keep, after, clock.seconds)
    todo = [leaf for leaf in leaves if leaf.name not in results.runs]
    for run in {run.name: run for leaf in todo for run in leaf.ancestry}.values():
        require_same_folder(run, runs.folder(run), texts[text_key(run.settings)])
    for leaf in todo:
        if runs.is_done(leaf, leaf.steps) or runs.has_halted(leaf, leaf.steps):
            after(leaf, 0.0)
    return runs


class Clock:
    """How long runs take, by those of this process; by what the study expects before there are any."""

    def __init__(self, at_once: int | None) -> None:
        """at_once: runs that share a GPU. None: there is none, so that nothing is expected."""
        self._at_once = at_once
        self._measured: dict[str, float] = {}
        """FLOP/s of one process, by the kind of run."""
        self._ratios: dict[str, float] = {}
        """The same as parts of what is expected."""
        self._starts: dict[tuple[str, bool], float] = {}
        """Seconds of a process besides its updates, by the kind of run and whether it is a trunk, which does
        not read all held-out text at its end. The newest of a kind holds: the first one compiles."""
        self._longest_start: float | None = None

    def measure(self, run: Run, seconds: float, folder: Path) -> None:
        """Takes note of a process that has made updates of a run in `seconds`."""
        firsts = [row["step"] for row in read_log(folder, "event") if row["what"] == "first update"]
        if not seconds or not firsts:
            return
        # Not those of the model that it was grown from, or of a process before.
        own = [row for row in read_log(folder, "train") if CARRIED not in row and row["step"] >= firsts[-1]]
        rate = speed(own[-200:])
        if rate is None:
            return
        self._measured[_kind(run)] = measured = rate * run.model.flops_per_token()
        expected = self._expected(run)
        if expected is not None:
            self._ratios[_kind(run)] = measured / expected
        updates = len(own) * run.settings.batch_tokens / rate
        self._starts[_kind(run), bool(run.keep)] = start = max(0.0, seconds - updates)
        self._longest_start = max(start, self._longest_start or 0.0)

    def seconds(self, run: Run, flops: float) -> float | None:
        """What a process is expected to take for so many FLOPs of a run."""
        kind = _kind(run)
        known = self._measured.get(kind, self._expected(run))
        if known is None and self._measured:
            known = statistics.fmean(self._measured.values())
        if known is None:
            return None
        if kind not in self._measured and self._ratios:  # the median: one guess may be far off
            known *= statistics.median(self._ratios.values())
        return self._start(kind, bool(run.keep)) + flops / known

    def _start(self, kind: str, trunk: bool) -> float:
        """Of this kind; else of its trunks, or of what comes off them; else of the one that took longest to
        compile."""
        unknown = START if self._longest_start is None else self._longest_start
        return self._starts.get((kind, trunk), self._starts.get((kind, not trunk), unknown))

    def _expected(self, run: Run) -> float | None:
        """FLOP/s that the study expects of a process; None where it says nothing."""
        speed = run.settings.flops_per_second
        return None if speed is None or self._at_once is None else speed / self._at_once


def _kind(run: Run) -> str:
    """Runs of one kind run at one speed."""
    config = run.settings.config
    shape = dataclasses.asdict(run.model)
    return json.dumps([shape, config.batch, config.grad_accum_steps, config.optim.optimizer])


def text_key(settings: Settings) -> str:
    """Runs with the same have the same text."""
    config = settings.config
    phases = (config.phases, settings.steps) if config.phases else None  # where they begin depends on both
    return repr((config.data, config.weights, phases, settings.tokenizer, settings.model.context))


def open_texts(leaves: list[Run], heldout: str | None, out: Path) -> dict[str, Text]:
    """Opens, or prepares, the text of every run.

    Raises:
        UserError: one cannot be opened, or lacks the held-out set that decides.
    """
    found: dict[str, Text] = {}
    for run in leaves:
        key = text_key(run.settings)
        if key not in found:
            settings = run.settings
            context = settings.model.context
            config = dataclasses.replace(settings.config, steps=run.steps)
            dataset = open_data(config, settings.tokenizer, context, out / run.name)
            names = dataset.heldout
            if not names or (heldout is not None and heldout not in names):
                raise UserError(
                    f"{data_text(config.data)} holds out {', '.join(names) or 'nothing'}, and the study "
                    f"compares losses on {heldout or 'held-out text'}: prepare the text with --valid, or "
                    "name another set as heldout in the study"
                )
            tokens = dataset.splits[TRAIN].windows * context
            found[key] = Text(tokens, _fingerprint(dataset))
    return found


def _fingerprint(data: Data) -> str:
    """Of the text alone: how it is mixed, and from when on, is among the settings of a run."""
    return digest(data.record()["sources"]) if isinstance(data, Mixture) else data_record(data)["fingerprint"]


def describe(
    definition: Definition,
    leaves: list[Run],
    results: Results,
    config: StudyConfig,
    out: Path,
    clock: Clock,
    at_once: int,
    gpus: tuple[str, ...],
) -> list[str]:
    """What is to be done, with what, and what it costs."""
    todo = [run for run in leaves if run.name not in results.runs]
    flops, seconds = cost(todo, clock)
    where = f"{len(gpus)} GPU{'s' * (len(gpus) != 1)}" if gpus else "the devices there are"
    minutes = "" if seconds is None else f", about {seconds / 60 / at_once:.0f} minutes of one GPU"
    lines = [
        f"{definition.name} ({definition.kind}): {len(todo)} of {len(leaves)} runs to do, {flops:.3g} FLOPs"
        f"{minutes}; on {where}, {at_once} at a time{' on each' if len(gpus) > 1 else ''}"
    ]
    if later := growth.later(definition, results) if definition.kind == "growth" else []:
        flops, seconds = cost(later, clock)
        minutes = "" if seconds is None else f", about {seconds / 60 / at_once:.0f} minutes of one GPU"
        lines.append(f"then {len(later)} runs, which depend on what these find: {flops:.3g} FLOPs{minutes}")
    limits = [f"{config.minutes:g} minutes"] if config.minutes is not None else []
    limits += [f"{config.flops:.3g} FLOPs"] if config.flops is not None else []
    if limits:
        lines.append(f"budget: {' and '.join(limits)}; what cannot end within it is left for another time")
    jobs = jobs_left(leaves, out, results, clock) if limits else []
    if config.flops is not None:
        costs = {job.name: job.cost for job in jobs}
        if large := [name for name, flops in costs.items() if flops > config.flops]:
            lines.append(
                f"{len(large)} of {len(costs)} processes cost more FLOPs than all of it and are not started, "
                f"such as {large[0]} ({costs[large[0]]:.3g}): give more --flops"
            )
    if config.minutes is not None:
        whole, fewer = 60 * config.minutes, ", or fewer --jobs" if at_once > 1 else ""
        taken = seconds_of(jobs)
        if long := [name for name, seconds in taken.items() if seconds > whole]:
            lines.append(
                f"{len(long)} of {len(taken)} processes are expected to take longer than all of it and are "
                f"not started, such as {long[0]} ({taken[long[0]] / 60:.1f} minutes): give more "
                f"--minutes{fewer}"
            )
        alone = {leaf.name: seconds_of(jobs_left([leaf], out, results, clock)) for leaf in todo}
        chains = {name: sum(one.values()) for name, one in alone.items() if not {*one}.intersection(long)}
        if long := [name for name, seconds in chains.items() if seconds > whole]:
            lines.append(
                f"{len(long)} of {len(todo)} runs take longer than it with the trunks that they come from, "
                f"such as {long[0]} ({chains[long[0]] / 60:.1f} minutes): keep --out for the next call, "
                f"which would train those trunks again without it, or give more --minutes{fewer}"
            )
    return lines


def jobs_left(leaves: list[Run], out: Path, results: Results, clock: Clock) -> list[Job]:
    """What is to be done for these runs."""
    return [job for job in plan(leaves, out, results, clock).jobs() if not job.done()]


def seconds_of(jobs: list[Job]) -> dict[str, float]:
    """What each is expected to take."""
    return {job.name: job.seconds() or 0.0 for job in jobs}


def plan(leaves: list[Run], out: Path, results: Results, clock: Clock) -> Runs:
    """The runs as jobs that are not started."""
    return Runs(out, leaves, lambda run: run.name in results.runs, lambda *_: None, clock.seconds)


def cost(todo: list[Run], clock: Clock) -> tuple[float, float | None]:
    """FLOPs of runs, what they share counted once; and the seconds of one process for them all."""
    spans: dict[str, tuple[Run, int]] = {}
    for leaf in todo:
        one, end = leaf, leaf.steps
        while one is not None:
            spans[one.name] = one, max(end, spans.get(one.name, (one, 0))[1])
            one, end = one.source, one.at
    flops = [(run, run.flops(end) - run.flops(run.at)) for run, end in spans.values()]
    seconds = [clock.seconds(run, part) for run, part in flops]
    return sum(part for _, part in flops), None if None in seconds else sum(seconds)


def list_runs(
    leaves: list[Run], out: Path, results: Results, clock: Clock, say: Callable[[str], None]
) -> None:
    """Says of every run what it costs and by which command it is trained."""
    for run in leaves:
        flops, seconds = cost([run], clock)
        if run.name in results.runs:
            known = "halted by the guard" if results.runs[run.name]["halted"] else "done"
        else:
            known = f"{flops:.3g} FLOPs" + ("" if seconds is None else f", {seconds:.0f} s")
        say(f"  {run.name}: {run.steps:,} steps, {known}")
    if jobs := plan(leaves, out, results, clock).jobs():
        say(f"first command: {cli.command(*jobs[0].command)}")
