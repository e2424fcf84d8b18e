"""--help: what one needs first at the top, every option once, in 80 columns; what is hidden can be given."""

import dataclasses
import importlib
import re
import sys
from pathlib import Path
from typing import Annotated, Literal

import pytest
import tyro

from core import cli
from core.run.help import TRAINING_OPTIONS
from core.run.settings import flatten
from port_torch import finetune
from port_torch import train as torch_train
from train_tpu import run as training
from train_tpu.aot import __main__ as aot
from train_tpu.config import FinetuneConfig, RunConfig

COMMANDS = (
    "core.generate", "train_tpu.run", "train_tpu.finetune", "train_tpu.prepare", "train_tpu.inspect",
    "train_tpu.replay.__main__",
    "train_tpu.aot.__main__", "stacking.advise.__main__", "stacking.grow", "stacking.study.__main__",
    "port_torch.train", "port_torch.finetune", "port_torch.convert", "port_torch.merge",
    "port_torch.import_checkpoint", "port_torch.generate", "eval.run", "eval.perplexity", "eval.compare",
    "kernels_cuda.build", "kernels_cuda.doctor", "kernels_cuda.bench",
)  # fmt: skip
SIX = ["--preset", "--data", "--out", "--steps", "--batch", "--lr"]


@dataclasses.dataclass(frozen=True)
class Inner:
    """Nested."""

    rate: float = 0.5
    """A rate."""


@dataclasses.dataclass(frozen=True)
class Base:
    """Extended below."""

    steps: int | None = None
    """Steps."""
    batch: int = 3
    """Batch of the base."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(Base):
    """What the command
    does.

        a table   as it is
    """

    source: Annotated[Path, tyro.conf.Positional]
    """The source."""
    out: Path
    batch: int = 4
    fast: bool = False
    """Fast."""
    slow: bool = True
    kind: Literal["a", "b"] | None = None
    names: tuple[str, ...] = ("x y", "z")
    start: Annotated[Path | None, tyro.conf.arg(name="from")] = None
    hidden: tyro.conf.Suppress[int] = 1
    inner: Inner = Inner()


def printed(parse, *argv: str, capsys) -> str:
    with pytest.raises(SystemExit) as ended:
        parse([*argv])
    assert not ended.value.code
    return capsys.readouterr().out


def options(text: str) -> list[str]:
    """The options that a help lists, in its order."""
    found = re.findall(r"^  (--\S+)", text, re.MULTILINE)
    return [name.replace("[no-]", "") for name in found]


def test_the_text(capsys):
    groups = {"first": ("steps", "unknown"), "advanced: rates": ("rate",), "again": ("steps",)}
    default = Config(source=Path("s"), out=Path("o"), steps=7)
    said = printed(lambda argv: cli.parse(Config, argv, prog="p", groups=groups), "-h", capsys=capsys)
    assert (
        said
        == """\
usage: p SOURCE --out PATH [options]

What the command does.

    a table   as it is

arguments:
  SOURCE                The source.

first:
  --steps INT           Steps.

options:
  --batch INT           Batch of the base. (default: 4)
  --out PATH
  --[no-]fast           Fast.
  --[no-]slow           (default: True)
  --kind {a,b}
  --names [STR ...]     (default: 'x y' z)
  --from PATH

--help-all lists 1 advanced options too.
"""
    )
    parse = lambda argv: cli.parse(Config, argv, prog="p", groups=groups, default=default)  # noqa: E731
    said = printed(parse, "--help-all", capsys=capsys)
    assert "Steps. (default: 7)" in said and "advanced: rates:\n  --rate FLOAT          A rate." in said
    assert cli.parse(Config, ["x", "--out=y", "--rate=2", "--no-slow"], prog="p").inner == Inner(2.0)


def test_six_options_come_first_and_internals_are_hidden(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    said, everything = (
        options(printed(training.parse, arg, capsys=capsys)) for arg in ("--help", "--help-all")
    )
    assert said[:6] == SIX == everything[:6]
    assert {"--unroll", "--loss-chunk", "--sigma", "--eps", "--show-sharding"} <= set(everything) - set(said)
    assert len(everything) == len(set(everything))
    assert set(everything) == {f"--{name.replace('_', '-')}" for name in flatten(RunConfig())}
    hidden = training.parse(["--unroll=2", "--sigma=5", "--eps=1e-7", "--z-loss=1"])
    assert (hidden.unroll, hidden.guard.sigma, hidden.optim.eps, hidden.z_loss) == (2, 5.0, 1e-7, 1.0)


def test_every_training_option_has_a_subject():
    """One that the table does not name would come after the six."""
    kinds = (RunConfig, FinetuneConfig, torch_train.TrainConfig, finetune.FinetuneConfig)
    named = [name for names in TRAINING_OPTIONS.values() for name in names]
    fields = {option.field for kind in kinds for option in cli.options_of(kind) if option.names}
    assert set(named) == fields
    own = {option.field for option in cli.options_of(aot.AotConfig)} - {"topology", "json"}
    assert own <= set(named)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_prints_its_help(name: str, monkeypatch, capsys):
    module = importlib.import_module(name)
    for argument in ("--help", "--help-all"):
        monkeypatch.setattr(sys, "argv", [name, argument])
        with pytest.raises(SystemExit) as ended:
            module.main()
        assert not ended.value.code
        said = capsys.readouterr().out
        assert said.startswith(f"usage: python -m {name.removesuffix('.__main__')}")
        assert max(map(len, said.splitlines())) <= 80 and "None" not in said
        for line in said.splitlines():
            assert not re.fullmatch(r"  --\S+( \S+)?", line) or len(line) > 22, f"{line} says nothing"
        listed = options(said)
        assert len(listed) == len(set(listed))
