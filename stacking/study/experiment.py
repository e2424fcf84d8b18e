"""A study from its settings to its report: open and check the target, tune, train, report."""

import dataclasses
import json
import math
from collections.abc import Callable

from rich.console import Console

from core import cli
from core.config import preset
from core.errors import UserError
from core.run.data import choose_run_tokenizer, open_data
from core.run.folder import data_name
from core.run.presets import TRAINING_DEFAULTS
from core.run.settings import flatten, given_value, model_config
from stacking.jobs import run_jobs
from stacking.plan import make_plan
from stacking.schedule import parse_schedule
from stacking.study.arms import ArmKey, Study
from stacking.study.config import StudyConfig, Target
from stacking.study.report import write_report
from stacking.study.results import Arm
from train_tpu.config import RunConfig, defaults


def run_study(config: StudyConfig, arguments: tuple[str, ...], console: Console) -> None:
    """Trains what is missing of a study, and reports on what is there.

    Args:
        arguments: the target's, as `train_tpu.run` takes them.

    Raises:
        UserError: it cannot be carried out, or nothing can be reported yet.
    """
    target = open_target(config, arguments)
    study = Study(config, target)
    check_lengths(config, study)

    def train(keys: list[ArmKey], lengths: Callable[[ArmKey], tuple[int, ...]], what: str) -> None:
        if config.report or not keys:
            return
        jobs = [job for key in keys for job in study.jobs(key, lengths(key))]
        console.print(what, markup=False, highlight=False)
        run_jobs(jobs, config.out, config.jobs, config.gpus, console, config.dry_run)

    # 1. The learning rate of every arm.
    lrs = config.lrs or (target.run.optim.lr,)
    tuning = [key for lr in lrs for key in study.keys(config.seeds[0], lr)] if len(lrs) > 1 else []
    what = f"tuning: {len(tuning)} arms at {len(lrs)} learning rates, decayed at equal tokens"
    train(tuning, lambda _: (target.steps,), what)
    best: dict[str, float] | float = lrs[0]
    if tuning and not config.dry_run:
        best = tune(study, tuning)
        for line in describe_rates(best, lrs):
            console.print(line, markup=False, highlight=False)

    # 2. The arms themselves.
    keys = [key for seed in config.seeds for key in study.keys(seed, best)]
    what = f"the study: {len(keys)} arms, {len(config.seeds)} seeds among them"
    train(keys, lambda key: study.lengths(key.grown_at), what)
    if config.dry_run:
        return

    # 3. What they say.
    arms = [arm for key in keys if (arm := study.result(key, study.lengths(key.grown_at)))]
    write_record(study, arms, [arm for key in tuning if (arm := study.result(key, (target.steps,)))])
    console.print(write_report(config.out, config.heldout), markup=False, highlight=False)


def write_record(study: Study, arms: list[Arm], tuning: list[Arm]) -> None:
    """Writes study.json: settings, models and all losses, of the seeds in which scratch was trained.

    Raises:
        UserError: there is no such seed, so that nothing can be said yet.
    """
    config, target = study.config, study.target
    halted = [arm for arm in arms if arm.halted]
    seeds = {arm.seed for arm in arms if arm.op == "scratch" and not arm.halted}
    if not seeds:
        if any(arm.op == "scratch" for arm in halted):
            raise UserError(f"the guard halted scratch in every seed, see {config.out}: give a smaller --lr")
        raise UserError(f"{config.out} holds no decayed scratch run yet: leave --report out to train it")
    record = {
        "study": flatten(config),
        "run": flatten(target.run),
        "models": {"target": dataclasses.asdict(target.model), "base": dataclasses.asdict(target.base)},
        "arms": [dataclasses.asdict(arm) for arm in arms if arm.seed in seeds and not arm.halted],
        "halted": [dataclasses.asdict(arm) for arm in halted],
        "tuning": [dataclasses.asdict(arm) for arm in tuning],
    }
    (config.out / "study.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def open_target(config: StudyConfig, arguments: tuple[str, ...]) -> Target:
    """The target's run out of its arguments, with its data prepared and its sizes known."""
    for flag in ("--out", "--stop-at", "--epochs"):
        if any(text == flag or text.startswith(f"{flag}=") for text in arguments):
            raise UserError(f"{flag} after -- is set by the study: leave it out")
    default = defaults(given_value(list(arguments), "--preset") or RunConfig.preset)
    run = cli.parse(RunConfig, arguments, prog="python -m train_tpu.run", default=default)
    if run.steps is None:
        raise UserError("the target needs --steps after --: the updates that scratch gets")
    if run.optim.schedule != "wsd" or not run.optim.decay:
        raise UserError("arms are decayed off a trunk: the target's --schedule must be wsd, with a --decay")
    tokenizer = choose_run_tokenizer(run, TRAINING_DEFAULTS[run.preset]["tokenizer"])
    context = preset(run.preset).context if run.model.context is None else run.model.context
    dataset = open_data(run, tokenizer.name, context, config.out)
    names = dataset.heldout
    if not names or (config.heldout and config.heldout not in names):
        raise UserError(
            f"--heldout {config.heldout}: {data_name(run.data)} holds out {', '.join(names) or 'nothing'}"
        )
    model = model_config(run, dataset.tokenizer_record["vocab_size"])
    n = round(model.n_layers / config.factor)
    if n < 1 or n * config.factor != model.n_layers:
        raise UserError(
            f"{model.n_layers} layers cannot be reached by growing by a factor of {config.factor:g}: choose "
            "a target whose layers divided by the factor are a whole number"
        )
    for op in config.ops:
        make_plan(op, n, config.factor)  # refuses a factor that does not fit
    return Target(arguments, run, run.steps, model, dataclasses.replace(model, n_layers=n))


def check_lengths(config: StudyConfig, study: Study) -> None:
    """The earliest fork must come after every growth and its re-warming, or it decays an unsettled model."""
    if config.schedule.startswith("restart"):
        raise UserError(
            "--schedule restart would give the grown arms another decay than scratch, and then nothing could "
            "be compared: give rewarm:N or keep"
        )
    first = study.target.decay_start(min(study.lengths(0)))
    for at in study.grow_steps:
        settled = at + parse_schedule(config.schedule, study.target.steps - at).rewarm
        if not (0 < at < first and settled <= first):
            raise UserError(
                f"the earliest decay begins at step {first}, but the growth at step {at} is not settled "
                f"before step {settled}: give a smaller fraction, a larger --early or a shorter re-warming"
            )


def tune(study: Study, tuning: list[ArmKey]) -> dict[str, float]:
    """Every arm's learning rate of the lowest decayed loss; one that the guard halted has none."""
    best: dict[str, list[tuple[float, float]]] = {}
    for key in tuning:
        arm = study.result(key, (study.target.steps,))
        if arm is None:
            raise UserError(
                f"{study.config.out} lacks {key.name} at {key.lr:g}: leave --report out to train it"
            )
        loss = math.inf
        if not arm.halted:
            (point,) = arm.decayed
            loss = point.losses[study.config.heldout or next(iter(point.losses))]
        best.setdefault(key.name, [])
        if math.isfinite(loss):
            best[key.name].append((loss, key.lr))
    for name, losses in best.items():
        if not losses:
            raise UserError(
                f"{name} was trained at none of --lrs {' '.join(f'{lr:g}' for lr in study.config.lrs)}: the "
                "guard halted it or its loss was not finite; give smaller ones"
            )
    return {name: min(losses)[1] for name, losses in best.items()}


def describe_rates(best: dict[str, float], lrs: tuple[float, ...]) -> list[str]:
    """The tuned rates in words, and which of them lie at an edge of those tried."""
    lines = [f"best rates: {', '.join(f'{arm} {lr:g}' for arm, lr in best.items())}"]
    for edge, where in ((min(lrs), "below"), (max(lrs), "above")):
        if at_edge := [arm for arm, lr in best.items() if lr == edge]:
            names = ", ".join(at_edge)
            lines.append(f"{edge:g} is the edge of --lrs: the best rate of {names} may lie {where} it")
    return lines
