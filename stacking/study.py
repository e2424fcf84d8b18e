"""`python -m stacking.study`: does growing pay? Growth against training from scratch, fairly.

    python -m stacking.study --out studies/mine -- --preset mtlm1-88m --data DATA --steps 2000 ...

What stands behind the second -- is the target model's training run, as `train_tpu.run` takes it. The arms:

    scratch      the target from the first step on
    OP at f      a base of fewer layers trained for the fraction f of the steps, grown by OP, trained on

Fair means: all arms of a seed see the same sequences in the same order. Every arm is a trunk at a constant
learning rate, and what is compared are decays forked off it, since an undecayed loss says little about the
decayed one. All arms are tuned over the same learning rates. The base's FLOPs count. Every arm is decayed at
three lengths: at equal tokens, at equal FLOPs, and earlier, so that the FLOPs to reach scratch's loss can be
read off without extrapolating. Seeds are paired, and their spread stands beside every number.

Each arm is a `train_tpu.run` in a process of its own; whatever is there already is not done again.
"""

import dataclasses
import functools
import json
import math
import signal
import sys

import jax

from core import cli
from core.data.prepare import choose_tokenizer, open_or_prepare
from core.errors import UserError, run_command
from core.folders import CACHE
from core.run.presets import TRAINING_DEFAULTS
from core.run.progress import make_console
from core.run.settings import flatten, model_config
from stacking.arms import ArmKey, Study, StudyConfig, Target
from stacking.jobs import run_jobs
from stacking.plan import make_plan
from stacking.report import write_report
from stacking.schedule import parse_schedule
from train_tpu import run as train


def main() -> int:
    """Runs the command; returns its exit code."""
    jax.config.update("jax_platforms", "cpu")  # the devices are the arms'
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the arms are told, too
    console = make_console()
    argv = sys.argv[1:]
    at = argv.index("--") if "--" in argv else len(argv)
    config = cli.parse(StudyConfig, argv[:at], prog="python -m stacking.study", description=__doc__)
    target = open_target(config, tuple(argv[at + 1 :]))
    study = Study(config, target)
    check_lengths(config, study)

    lrs = config.lrs or (target.run.optim.lr,)
    tuning = [key for lr in lrs for key in study.keys(config.seeds[0], lr)] if len(lrs) > 1 else []
    jobs = [job for key in tuning for job in study.jobs(key, (target.steps,))]
    if tuning and not config.report:
        console.print(f"tuning: {len(tuning)} arms at {len(lrs)} learning rates, decayed at equal tokens")
        run_jobs(jobs, config.out, config.jobs, config.gpus, console, config.dry_run)
    best: dict[str, float] | float = lrs[0]
    if tuning and not config.dry_run:
        best = tune(study, tuning)
        say = functools.partial(console.print, markup=False, highlight=False)
        say(f"best rates: {', '.join(f'{arm} {lr:g}' for arm, lr in best.items())}")
        for edge, where in ((min(lrs), "below"), (max(lrs), "above")):
            at_edge = [arm for arm, lr in best.items() if lr == edge]
            if at_edge:
                say(
                    f"{edge:g} is the edge of --lrs: the best rate of {', '.join(at_edge)} may lie {where} it"
                )

    keys = [key for seed in config.seeds for key in study.keys(seed, best)]
    jobs = [job for key in keys for job in study.jobs(key, study.lengths(key.grown_at))]
    if not config.report:
        console.print(f"the study: {len(keys)} arms, {len(config.seeds)} seeds among them")
        run_jobs(jobs, config.out, config.jobs, config.gpus, console, config.dry_run)
    if config.dry_run:
        return 0
    arms = [arm for key in keys if (arm := study.result(key, study.lengths(key.grown_at)))]
    halted = [arm for arm in arms if arm.halted]
    arms = [arm for arm in arms if not arm.halted]
    seeds = {arm.seed for arm in arms if arm.op == "scratch"}  # nothing can be said without it
    arms = [arm for arm in arms if arm.seed in seeds]
    if not arms:
        if any(arm.op == "scratch" for arm in halted):
            raise UserError(f"the guard halted scratch in every seed, see {config.out}: give a smaller --lr")
        raise UserError(f"{config.out} holds no decayed scratch run yet: leave --report out to train it")
    record = {
        "study": flatten(config),
        "run": flatten(target.run),
        "models": {"target": dataclasses.asdict(target.model), "base": dataclasses.asdict(target.base)},
        "arms": [dataclasses.asdict(arm) for arm in arms],
        "halted": [dataclasses.asdict(arm) for arm in halted],
        "tuning": [dataclasses.asdict(arm) for key in tuning if (arm := study.result(key, (target.steps,)))],
    }
    path = config.out / "study.json"
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    console.print(write_report(config.out, config.heldout), markup=False, highlight=False)
    return 0


def open_target(config: StudyConfig, arguments: tuple[str, ...]) -> Target:
    """The target's run out of its arguments, with its data prepared and its sizes known."""
    for flag in ("--out", "--stop-at", "--epochs"):
        if any(text == flag or text.startswith(f"{flag}=") for text in arguments):
            raise UserError(f"{flag} behind -- is the study's own matter: leave it out")
    # Without an --out it would take its settings from the run in the preset's own folder, if there is one.
    run = train.parse([*arguments, "--out", str(config.out / "target")])
    if run.steps is None:
        raise UserError("the target needs --steps behind --: the updates that scratch gets")
    if run.optim.schedule != "wsd" or not run.optim.decay:
        raise UserError("arms are decayed off a trunk: the target's --schedule must be wsd, with a --decay")
    given = TRAINING_DEFAULTS[run.preset]
    tokenizer = choose_tokenizer(run.tokenizer, run.data, given["tokenizer"])
    context = run.model.context
    if context is None:
        context = settings.preset(run.preset).context
    dataset = open_or_prepare(run.data, tokenizer.name, context, CACHE)
    names = dataset.heldout
    if not names or (config.heldout and config.heldout not in names):
        raise UserError(f"--heldout {config.heldout}: {run.data} holds out {', '.join(names) or 'nothing'}")
    model = model_config(run, dataset.tokenizer_record["vocab_size"])
    n = round(model.n_layers / config.factor)
    if n < 1 or n * config.factor != model.n_layers:
        raise UserError(f"a target of {model.n_layers} layers is no growth of anything by {config.factor:g}")
    for op in config.ops:
        make_plan(op, n, config.factor)  # refuses a factor that does not fit
    return Target(arguments, run, run.steps, model, dataclasses.replace(model, n_layers=n))


def check_lengths(config: StudyConfig, study: Study) -> None:
    """The earliest fork must lie behind every growth and its re-warming, or it decays an unsettled model."""
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


if __name__ == "__main__":
    run_command(main)
