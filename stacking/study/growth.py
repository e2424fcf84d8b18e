"""Growth compared with training from scratch, fairly.

One block [[runs]] is the target, the deeper model, with its length; and with

    grow_at = [0.25, 0.5, 0.75]    # fractions of its steps that the small model is trained for first
    ops = ["stack", "random"]      # ways of growing; random is the control
    factor = 2.0                   # layers of the target / layers of the small model
    grow_schedule = "rewarm:50"    # as stacking.grow takes --schedule
    early = 0.8                    # the shortest decayed run of a grown arm, as a fraction of the steps
    seed = [0, 1]
    lr = [1e-3, 2e-3, 4e-3]        # every arm is tuned over these, on the first seed

The first op at the first fraction is the main way of growing: it, scratch and the small model are tuned and
compared first, so that a study that is stopped after half of its time has answered its question.

The arms: `scratch`, the target from its first step; `small`, the small model for longer; `OP at STEP`. Fair
means: all arms of a seed see the same sequences in the same order. Every arm is a trunk at a constant
learning rate, and what is compared are decays forked off it, since an undecayed loss says little about the
decayed one. All arms are tuned over the same rates. The small model's FLOPs count. Every arm is decayed at
the target's steps and at the FLOPs of the other arms, a grown one also early, so that the FLOPs to reach
scratch's loss can be read off without extrapolating.
Seeds are paired, and every figure has their spread.
"""

import dataclasses
import math
from typing import Any, get_args

from core import checks
from core.errors import UserError
from core.run.schedule import decay_steps
from stacking.plan import Operator, make_plan
from stacking.schedule import parse_schedule
from stacking.study.definition import Definition, Settings, open_settings
from stacking.study.results import Results
from stacking.study.runs import TRUNK, Run

OPTIONS = {"grow_at", "ops", "factor", "grow_schedule", "early"}
SCRATCH, SMALL = "scratch", "small"


@dataclasses.dataclass(frozen=True)
class Target:
    """What is compared, and how."""

    given: dict[str, Any]
    """Settings of the target but for peak rate and seed."""
    settings: Settings
    small: Settings
    grow_at: tuple[int, ...]
    """Steps."""
    ops: tuple[str, ...]
    factor: float
    grow_schedule: str
    early: float
    seeds: tuple[int, ...]
    lrs: tuple[float, ...]

    @property
    def arms(self) -> list[tuple[str, int]]:
        """(operator, step of growth) of every arm; 0 for those that do not grow."""
        return [(SCRATCH, 0), (SMALL, 0), *((op, at) for at in self.grow_at for op in self.ops)]

    @property
    def turns(self) -> list[list[tuple[str, int]]]:
        """The arms in the order of what they say: the main way of growing and its rivals, then the others."""
        rivals = 2
        return [turn for turn in (self.arms[: rivals + 1], self.arms[rivals + 1 :]) if turn]

    def flops(self, arm: str, at: int, steps: int) -> int:
        """Of an arm trained for `steps`."""
        if arm == SMALL:
            return steps * self.small.flops_per_step
        grown = min(steps, at)
        return grown * self.small.flops_per_step + (steps - grown) * self.settings.flops_per_step

    def lengths(self, arm: str, at: int) -> list[int]:
        """Steps of an arm's decayed runs: at equal tokens, and where it has cost as much as another; of a
        grown one also early, if it has settled by then."""
        steps = self.settings.steps
        others = {self.flops(SCRATCH, 0, steps), *(self.flops("grown", s, steps) for s in self.grow_at)}
        if arm == SCRATCH:
            return sorted({steps, *(round(flops / self.settings.flops_per_step) for flops in others)})
        if arm == SMALL:
            return sorted({steps, *(round(flops / self.small.flops_per_step) for flops in others)})
        rest = max(others) - self.flops(arm, at, at)
        early = round(self.early * steps)
        settled = self.decay_start(early) >= self.settled(at)
        equal = at + round(rest / self.settings.flops_per_step)
        return sorted({steps, equal, *([early] if settled else [])})

    def settled(self, at: int) -> int:
        """The step at which a model grown at `at` has warmed up again."""
        return at + parse_schedule(self.grow_schedule, self.settings.steps - at).rewarm

    def decay_start(self, steps: int) -> int:
        """The last step at which a schedule of `steps` has the constant rate."""
        return steps - decay_steps(self.settings.config.optim, steps)


def runs(definition: Definition, results: Results) -> list[Run]:
    """The decayed runs: of each part of the study once those before it have ended."""
    return _unique(_reached(open_target(definition), results, definition.heldout))


def later(definition: Definition, results: Results) -> list[Run]:
    """What will come after them, as if the first rate were every arm's best: what it costs is known."""
    target = open_target(definition)
    return [run for run in _rest(target, definition, results, 1) if run.name not in results.runs]


def possible(definition: Definition, results: Results) -> list[Run]:
    """What may come after them, whichever rates turn out to be best."""
    target = open_target(definition)
    return _rest(target, definition, results, len(target.lrs))


def _rest(target: Target, definition: Definition, results: Results, rates: int) -> list[Run]:
    """The runs of the parts that have not begun, those at best rates at each of the first `rates`."""
    reached = _reached(target, results, definition.heldout)
    parts = []
    for arms in target.turns:
        finals = [_final(target, arms, dict.fromkeys(arms, lr)) for lr in target.lrs[:rates]]
        parts += [_tuning(target, arms), [run for final in finals for run in final]]
    known = {run.name for run in _unique(reached)}
    return [run for run in _unique(parts[len(reached) :]) if run.name not in known]


def _reached(target: Target, results: Results, heldout: str | None) -> list[list[Run]]:
    """The parts of the study that have ended, and the next: for every turn the runs that tune, and then those
    at the best rates."""
    parts: list[list[Run]] = []

    def has_ended() -> bool:
        return all(run.name in results.runs for run in parts[-1])

    for arms in target.turns:
        tuning = _tuning(target, arms)
        parts.append(tuning)
        if not has_ended():
            break
        parts.append(_final(target, arms, best_rates(results, tuning, heldout)))
        if not has_ended():
            break
    return parts


def _unique(parts: list[list[Run]]) -> list[Run]:
    return list({run.name: run for part in parts for run in part}.values())


def _tuning(target: Target, arms: list[tuple[str, int]]) -> list[Run]:
    """Arms at equal tokens, on the first seed, at every rate; none if there is only one."""
    lrs, steps = target.lrs if len(target.lrs) > 1 else (), target.settings.steps
    return [
        run for lr in lrs for arm in arms for run in _decayed(target, *arm, target.seeds[0], lr, (steps,))
    ]


def _final(target: Target, arms: list[tuple[str, int]], best: dict[tuple[str, int], float]) -> list[Run]:
    """The decayed runs of these arms, of every seed, each arm at its best rate."""
    steps = target.settings.steps

    def rank(run: Run) -> int:
        """At equal tokens and the small model first, then at equal FLOPs: a stop leaves what says most."""
        if run.steps == steps or run.labels["arm"] == SMALL:
            return 0
        return 1 if run.steps > steps else 2

    leaves = [
        run
        for seed in target.seeds
        for arm in arms
        for run in _decayed(target, *arm, seed, best.get(arm, target.lrs[0]), target.lengths(*arm))
    ]
    return sorted(leaves, key=lambda run: (rank(run), target.seeds.index(run.labels["seed"])))


def best_rates(results: Results, tuning: list[Run], heldout: str | None) -> dict[tuple[str, int], float]:
    """Every arm's rate of the lowest decayed loss; one that the guard halted has none."""
    found: dict[tuple[str, int], list[tuple[float, float]]] = {}
    for run in tuning:
        arm = (run.labels["arm"], run.labels["grown_at"])
        losses = results.losses(run.name)
        found.setdefault(arm, [])
        if losses is not None:
            loss = losses[heldout or next(iter(losses))]
            if math.isfinite(loss):
                found[arm].append((loss, run.labels["lr"]))
    for (arm, _), losses in found.items():
        if not losses:
            raise UserError(
                f"{arm} came to a finite loss at none of its rates (the guard halted it): give smaller lr"
            )
    return {arm: min(losses)[1] for arm, losses in found.items()}


def _decayed(target: Target, arm: str, at: int, seed: int, lr: float, lengths: Any) -> list[Run]:
    """An arm's decayed runs of these lengths."""
    trunk = _trunk(target, arm, at, seed, lr)
    prefix, whole = trunk.name.removesuffix("/trunk"), target.settings.steps
    labels = {name: value for name, value in trunk.labels.items() if name != "trunk"}
    return [
        Run(
            f"{prefix}/decayed-{n}", trunk.settings, n, labels | {"equal_tokens": n == whole},
            source=trunk, at=target.decay_start(n),
        )
        for n in lengths
    ]  # fmt: skip


def _trunk(target: Target, arm: str, at: int, seed: int, lr: float) -> Run:
    place = f"seed-{seed}/lr-{lr:g}"
    labels = {"arm": arm, "grown_at": at, "seed": seed, "lr": lr, "trunk": True}
    forks = {target.decay_start(n) for n in target.lengths(arm, at)}
    if arm in (SCRATCH, SMALL):
        settings = target.settings if arm == SCRATCH else target.small
        keep = forks | (set(target.grow_at) if arm == SMALL else set())
        one = _with(settings, lr, seed)
        return Run(f"{place}/{arm}/trunk", one, TRUNK, labels, keep=tuple(sorted(keep)))
    grow = ("--op", arm, "--factor", str(target.factor), "--schedule", target.grow_schedule)
    return Run(
        f"{place}/{arm}-at-{at}/trunk", _with(target.settings, lr, seed), TRUNK, labels,
        source=_trunk(target, SMALL, 0, seed, lr), at=at, grow=grow, keep=tuple(sorted(forks)),
    )  # fmt: skip


def _with(settings: Settings, lr: float, seed: int) -> Settings:
    optim = dataclasses.replace(settings.config.optim, lr=lr)
    config = dataclasses.replace(settings.config, optim=optim, seed=seed)
    return dataclasses.replace(settings, given=settings.given | {"lr": lr, "seed": seed}, config=config)


def open_target(definition: Definition) -> Target:
    """What a study of growth compares.

    Raises:
        UserError: it cannot be compared so.
    """
    if len(definition.blocks) > 1:
        raise UserError(f"a study of growth has one [[runs]], the target; this has {len(definition.blocks)}")
    block = dict(definition.blocks[0])
    name = block.pop("name")
    options = {key: block.pop(key) for key in OPTIONS & set(block)}
    seeds = _listed(name, "seed", block.pop("seed", 0))
    lrs = _listed(name, "lr", block.pop("lr", None))
    for key, value in block.items():
        if isinstance(value, list):
            raise UserError(f"runs {name}: in a study of growth only lr and seed may be lists, not {key}")
    settings = open_settings(name, block | ({} if lrs[0] is None else {"lr": lrs[0]}) | {"seed": seeds[0]})
    for lr, seed in ((lr, seed) for lr in lrs for seed in seeds):
        checks.positive(lr=lr)
        checks.seeds(seed=seed)
    if settings.config.phases:
        raise UserError(
            f"runs {name}: phases are parts of one length, and arms are decayed at several: leave phases out"
        )
    if lrs[0] is None:
        lrs = (settings.config.optim.lr,)
    factor, early = options.get("factor", 2.0), options.get("early", 0.8)
    checks.positive(factor=factor)
    checks.between_zero_and_one(early=early)
    fractions = _listed(name, "grow_at", options.get("grow_at", [0.25, 0.5]))
    for fraction in fractions:
        checks.between_zero_and_one(grow_at=fraction)
    small = _small(name, block, settings, factor, seeds[0], lrs[0])
    at = tuple(round(fraction * settings.steps) for fraction in fractions)
    ops = _listed(name, "ops", options.get("ops", ["stack", "random"]))
    for op in ops:
        if op not in get_args(Operator):
            raise UserError(f"runs {name}: {op!r} is no way of growing: {', '.join(get_args(Operator))}")
    target = Target(
        block, settings, small, at, ops, factor, options.get("grow_schedule", "rewarm:50"), early, seeds, lrs
    )
    _check(target)
    return target


def _small(
    name: str, block: dict[str, Any], whole: Settings, factor: float, seed: int, lr: float
) -> Settings:
    layers = whole.model.n_layers
    n = round(layers / factor)
    if n < 1 or n * factor != layers:
        raise UserError(
            f"runs {name}: {layers} layers cannot be reached by growing by a factor of {factor:g}: choose a "
            "target whose layers divided by the factor are a whole number"
        )
    given = block | {"preset": whole.config.preset, "n_layers": n, "lr": lr, "seed": seed}
    return open_settings(name, given)


def _listed(name: str, key: str, value: Any) -> tuple[Any, ...]:
    values = tuple(value) if isinstance(value, list) else (value,)
    if not values or len(set(values)) < len(values):
        raise UserError(f"runs {name}: {key} needs values, each of them once")
    return values


def _check(target: Target) -> None:
    """Refuses what cannot be compared: the earliest fork must come after every growth and its re-warming."""
    optim = target.settings.config.optim
    if optim.schedule != "wsd" or not optim.decay:
        raise UserError("arms are decayed off a trunk: the target's schedule must be wsd, with a decay")
    if target.grow_schedule.startswith("restart"):
        raise UserError(
            'grow_schedule = "restart" would give the grown arms another decay than scratch, and nothing '
            "could be compared: give rewarm:N or keep"
        )
    for op in target.ops:
        make_plan(op, target.small.model.n_layers, target.factor)  # refuses a factor that does not fit
    decay = target.decay_start(target.settings.steps)
    for at in target.grow_at:
        if not 0 < at <= target.settled(at) <= decay:
            raise UserError(
                f"the decay at equal tokens begins at step {decay}, but the growth at step {at} is not "
                f"settled before step {target.settled(at)}: give a smaller fraction or a shorter re-warming"
            )
