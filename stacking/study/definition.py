"""A study file: what it holds, checked, and the settings of the runs that it asks for.

    kind = "tuning"                # or "saturation", "growth"

    [settings]                     # of all runs, as train_tpu.run names them
    data = "data/wiki-books"

    [[runs]]
    name = "40m"
    preset = "mtlm2-40m"
    tokens = 65e6                  # instead of steps
    flops_per_second = 2.8e14      # of one GPU, until runs have been measured
    lr = [4e-3, 8e-3, 16e-3]       # a list is an axis: one run for each value
    seed = [0, 1]

A list within a list is one value. So a mixture is

    data = [["wiki=data/wiki", "books=data/books"]]
    weights = [["wiki=0.7", "books=0.3"], ["wiki=0.5", "books=0.5"]]   # here an axis of two mixtures

and in a study of tuning it may have `phases`, too.

What a kind needs besides settings is in tuning.py, saturation.py and growth.py. Runs are trained in the order
in which they stand here; the first axis of a block changes slowest.
"""

import dataclasses
import difflib
import functools
import itertools
import json
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from core import checks, cli
from core.config import ModelConfig
from core.data.mixture_options import parse_data
from core.data.text import read_text
from core.errors import UserError
from core.run.data import choose_run_tokenizer
from core.run.presets import TRAINING_DEFAULTS
from core.run.rates import with_rate
from core.run.settings import flatten, given_value, model_config
from train_tpu.config import RunConfig, defaults

STUDIES = Path(__file__).parents[1] / "studies"
KINDS = ("tuning", "saturation", "growth")
TABLES = {"kind", "heldout", "settings", "runs"}
# Settings of a run that the study itself gives.
OURS = {
    "out", "stop_at", "epochs", "keep_steps", "keep_every", "keep_last", "save_every", "from_step",
    "fallback", "allow_change", "schedule_start", "rewarm", "rewarm_at", "coordinator", "num_processes",
    "process_id", "show_sharding",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Definition:
    """What a study file says."""

    name: str
    kind: str
    heldout: str | None
    """The held-out set that decides. None: the data's first."""
    blocks: tuple[dict[str, Any], ...]
    """The tables [[runs]], each with the common settings."""
    text: str
    """The file."""


def read_definition(study: str, data: Sequence[str] | None) -> Definition:
    """The study in a file, or the one of ours with that name; data: instead of its own.

    Raises:
        UserError: there is no such study, or it says what cannot be.
    """
    path = Path(study) if study.endswith(".toml") else STUDIES / f"{study}.toml"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in STUDIES.glob("*.toml")))
        raise UserError(f"there is no study {study}: give a .toml file, or one of {known}")
    text = read_text(path)
    try:
        content = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{path} is not TOML ({error}): correct it") from None
    _require_known(path, content, TABLES)
    if content.get("kind") not in KINDS:
        raise UserError(f"{path}: kind is {content.get('kind')!r}, not one of {', '.join(KINDS)}")
    common, runs = content.get("settings", {}), content.get("runs")
    tables = [common, *(runs if isinstance(runs, list) else [])]
    if len(tables) < 2 or not all(isinstance(table, dict) for table in tables):
        raise UserError(
            f"{path} asks for no runs: give it tables [[runs]], and [settings] for what they share"
        )
    if data is not None:
        common = common | {"data": [list(data)] if len(data) > 1 else data[0]}
    names = [block.get("name") for block in runs]
    for name in names:
        if not isinstance(name, str) or not name.strip(".") or "/" in name:  # of a folder
            raise UserError(f"{path}: every [[runs]] needs a name without a slash, not {name!r}")
        if names.count(name) > 1:
            raise UserError(f"{path} has {names.count(name)} [[runs]] of the name {name}: give each its own")
    blocks = tuple(_with_values(common | block) for block in runs)
    return Definition(path.stem, content["kind"], content.get("heldout"), blocks, text)


def _with_values(block: dict[str, Any]) -> dict[str, Any]:
    """The settings of a block, in which only axes are lists: a list that is one value is a tuple.

    Raises:
        UserError: a mixture is given as an axis.
    """
    made = {}
    for name, value in block.items():
        if isinstance(value, list):
            _require_no_mixture(block["name"], name, value)
            values = [tuple(one) if isinstance(one, list) else one for one in value]
            value = values[0] if len(values) == 1 and isinstance(values[0], tuple) else values
        made[name] = value
    return made


def _require_no_mixture(block: str, name: str, values: list[Any]) -> None:
    texts = [value for value in values if isinstance(value, str)]
    named = name == "data" and len(texts) > 1 and all(isinstance(parse_data(one), dict) for one in texts)
    if texts and (named or name in ("weights", "phases")):
        raise UserError(
            f"runs {block}: {name} is a list, so each of its values would be a run of its own; a mixture is "
            f"one value, a list within a list: {name} = {json.dumps([values])}"
        )


def _require_known(where: Any, given: dict[str, Any], known: set[str]) -> None:
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            meant = f"did you mean {near[0]}?" if near else f"it takes {', '.join(sorted(known))}"
            raise UserError(f"{where}: there is no setting {name}: {meant}")


@dataclasses.dataclass(frozen=True)
class Settings:
    """The settings of a run that trains from its first step, opened."""

    block: str
    """The name of its [[runs]], for messages."""
    given: dict[str, Any]
    """What the study says, as train_tpu.run names it."""
    config: RunConfig
    model: ModelConfig
    tokenizer: str
    tokens: float | None
    """Asked for instead of steps."""
    flops_per_second: float | None
    """What one GPU is expected to reach."""

    @property
    def batch_tokens(self) -> int:
        """Tokens per update."""
        return self.config.batch * self.model.context

    @property
    def steps(self) -> int:
        """Updates of its schedule.

        Raises:
            UserError: neither steps nor tokens are given.
        """
        if self.config.steps is not None:
            return self.config.steps
        if self.tokens is None:
            raise UserError(f"runs {self.block} need steps or tokens")
        return max(1, round(self.tokens / self.batch_tokens))

    @functools.cached_property
    def flops_per_step(self) -> int:
        """Training FLOPs of an update."""
        return self.batch_tokens * self.model.flops_per_token()

    def arguments(self, **more: Any) -> tuple[str, ...]:
        """The command line of train_tpu.run."""
        return flags(self.given | {"preset": self.config.preset} | more)


def flags(settings: dict[str, Any]) -> tuple[str, ...]:
    """Settings as they are typed."""
    typed: list[str] = []
    for name, value in settings.items():
        flag = checks.option(name)
        if isinstance(value, bool):
            typed.append(flag if value else f"--no-{flag[2:]}")
        else:
            typed += [flag, *map(str, value if isinstance(value, tuple) else (value,))]
    return tuple(typed)


def open_settings(block: str, given: dict[str, Any]) -> Settings:
    """The settings of a run, checked; what is not given is the preset's.

    block: the name of its [[runs]], for messages.
    """
    given = dict(given)
    tokens, speed = given.pop("tokens", None), given.pop("flops_per_second", None)
    default = defaults(given.get("preset", RunConfig.preset))
    known = set(flatten(default)) - OURS
    for name in given:
        if name in OURS:
            raise UserError(f"runs {block}: {name} is set by the study: leave it out")
    _require_known(f"runs {block}", given, known | {"tokens", "flops_per_second"})
    if tokens is not None and "steps" in given:
        raise UserError(f"runs {block}: give steps or tokens, not both")
    apart = {name: given[name] for name in ("lr", "seed") if name in given}  # most runs differ in them alone
    try:
        checks.positive(tokens=tokens, flops_per_second=speed)
        config, tokenizer, vocabulary = _open(flags({k: v for k, v in given.items() if k not in apart}))
        seed = {"seed": apart.pop("seed")} if "seed" in apart else {}
        config = dataclasses.replace(config, optim=dataclasses.replace(config.optim, **apart), **seed)
    except UserError as error:
        raise UserError(f"runs {block}: {error}") from None
    settings = Settings(block, given, config, model_config(config, vocabulary), tokenizer, tokens, speed)
    has_length = tokens is not None or config.steps is not None
    config, _ = with_rate(config, settings.model, settings.steps if has_length else None)
    return dataclasses.replace(settings, config=config)


@functools.lru_cache(maxsize=256)
def _open(arguments: tuple[str, ...]) -> tuple[RunConfig, str, int]:
    """The settings of a command line of train_tpu.run, and the name and the size of its tokenizer."""
    default = defaults(given_value(list(arguments), "--preset") or RunConfig.preset)
    config = cli.parse(RunConfig, arguments, prog="python -m train_tpu.run", default=default)
    tokenizer = _tokenizer(config.tokenizer, config.data, TRAINING_DEFAULTS[config.preset]["tokenizer"])
    return config, *tokenizer


@functools.lru_cache(maxsize=16)
def _tokenizer(given: str | None, data: str | tuple[str, ...], default: str) -> tuple[str, int]:
    tokenizer = choose_run_tokenizer(SimpleNamespace(data=data, tokenizer=given), default)
    return tokenizer.name, tokenizer.vocab_size


def combinations(block: dict[str, Any], apart: set[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The runs of a block: a name for each, made of the values of the axes, and its settings.

    apart: names that are no settings of a run, or no axes.
    """
    rest = {name: value for name, value in block.items() if name not in apart | {"name"}}
    axes = {name: value for name, value in rest.items() if isinstance(value, list)}
    for name, values in axes.items():
        if not values:
            raise UserError(f"runs {block['name']}: {name} is an empty list: give it values")
    for values in itertools.product(*axes.values()):
        chosen = dict(zip(axes, values, strict=True))
        parts = (f"{name}-{_short(value)}" for name, value in chosen.items())
        yield "/".join([block["name"], *parts]), rest | chosen


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return ("+".join(map(str, value)) if isinstance(value, tuple) else str(value)).replace("/", "_")
