"""Command lines: a mistake in one is one sentence, and those that are printed can be typed."""

import dataclasses
import shlex
from pathlib import Path
from typing import Annotated

import pytest
import tyro

from core import cli
from core.errors import UserError
from core.generate import GenerateConfig
from train_tpu.config import RunConfig


@dataclasses.dataclass(frozen=True)
class Inner:
    learning_rate: float = 0.5


@dataclasses.dataclass(frozen=True)
class Config:
    """A command."""

    source: Annotated[Path, tyro.conf.Positional]
    out: Path
    """With --elsewhere named in its help."""
    batch: int = 3
    steps: int | None = None
    """Steps."""
    inner: Inner = Inner()


def parsed(*argv: str) -> Config:
    return cli.parse(Config, argv, prog="python -m a.command")


def test_what_is_given_and_what_is_not():
    assert parsed("x", "--out", "y", "--learning-rate", "2") == Config(Path("x"), Path("y"), inner=Inner(2.0))
    assert parsed("x", "--out=y", "--steps", "4").steps == 4


HELP = "python -m a.command --help-all lists all options"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["x", "--out", "y", "--batchsize", "3"], "there is no option --batchsize: did you mean --batch?"),
        (["x", "--out=y", "--step=3"], "there is no option --step: did you mean --steps?"),
        (["x", "--out", "y", "--helo"], f"there is no option --helo: {HELP}"),
        (["x", "--out", "y", "--at", "3"], f"there is no option --at: {HELP}"),
        (["x", "--outt", "y"], "there is no option --outt: did you mean --out?"),
        (["x", "--out", "y", "--elsewhere"], f"there is no option --elsewhere: {HELP}"),
        (["x", "--out", "y", "more"], f"unexpected argument 'more': {HELP}"),
        (["x"], f"missing --out PATH ({HELP})"),
        ([], f"missing SOURCE, --out PATH ({HELP})"),
        (["x", "--out", "y", "--batch", "1e3"], f"--batch: '1e3' is not an integer ({HELP})"),
        (["x", "--out", "y", "--steps", "1e3"], f"--steps: '1e3' is not an integer ({HELP})"),
        (["x", "--out", "y", "--learning-rate", "low"], f"--learning-rate: 'low' is not a number ({HELP})"),
        (["x", "--out"], f"--out needs a value ({HELP})"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_sentence(argv, message, capsys):
    with pytest.raises(UserError) as error:
        parsed(*argv)
    assert str(error.value) == message
    assert capsys.readouterr() == ("", "")  # nothing beside it


def test_a_value_out_of_a_list_is_told_with_the_list():
    with pytest.raises(UserError, match="--dtype: 'fp32' is not one of 'auto', 'float32', 'bfloat16'"):
        cli.parse(RunConfig, ["--dtype", "fp32"], prog="x")


def test_a_printed_command_can_be_typed():
    line = cli.command("core.generate", Path("my runs/a"), "--prompt", "It's", "--max-new-tokens", 5)
    python, flag, module, *argv = shlex.split(line)
    assert (python, flag, module) == ("python", "-m", "core.generate")
    lines = "### Instruction:\nGo.\n"
    assert cli.command("m", lines) == "python -m m $'### Instruction:\\nGo.\\n'"  # on one line
    config = cli.parse(GenerateConfig, argv, prog="x")
    assert config.run == Path("my runs/a") and config.prompt == ["It's"] and config.max_new_tokens == 5
