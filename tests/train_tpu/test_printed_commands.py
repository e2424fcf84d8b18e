"""The commands that we print for the user can be typed as they stand: quoted, and taken by their parsers."""

import dataclasses
import shlex
from pathlib import Path

import pytest

from core import cli
from core.generate import GenerateConfig
from core.run.settings import model_config
from eval.run import EvalConfig
from port_torch.convert import ConvertConfig
from stacking.grow import GrowConfig
from stacking.schedule import continue_schedule, parse_schedule
from train_tpu import run as training
from train_tpu.config import defaults
from train_tpu.prepare import next_command
from train_tpu.report import next_commands

OUT = Path("my runs/it's")


def parsed(line: str):
    """The configuration that a printed command gives, from the parser of the command that it names."""
    python, flag, module, *argv = shlex.split(line)
    assert (python, flag) == ("python", "-m")
    if module == "train_tpu.run":
        return training.parse(argv)
    kinds = {
        "core.generate": GenerateConfig, "eval.run": EvalConfig, "stacking.grow": GrowConfig,
        "port_torch.convert": ConvertConfig,
    }  # fmt: skip
    return cli.parse(kinds[module], argv, prog=module)


@pytest.mark.parametrize("end", [40, 30, 39])
def test_what_a_run_says_to_do_next(end, monkeypatch, tmp_path):
    """At its end, stopped before its decay, and stopped in it."""
    monkeypatch.chdir(tmp_path)
    run = defaults("mtlm1-tiny")
    run = dataclasses.replace(run, steps=40, optim=dataclasses.replace(run.optim, lr=1e-2, warmup=5))
    lines = next_commands(OUT, run, 40, end).splitlines()
    assert lines[0] == "next:" and len(lines) == 6
    made = {
        type(config).__name__: config for config in (parsed(line.split(": ", 1)[1]) for line in lines[1:])
    }
    assert made["GenerateConfig"].run == OUT and made["EvalConfig"].model == OUT
    assert (made["ConvertConfig"].checkpoint, made["ConvertConfig"].out) == (OUT, Path(f"{OUT}-torch"))
    assert made["RunConfig"].preset == "mtlm1-tiny"
    # Growing as it is advised is no jump of the learning rate.
    grow = made["GrowConfig"]
    assert (grow.source, grow.out) == (OUT, Path(f"{OUT}-grown"))
    schedule = parse_schedule(grow.schedule, (grow.steps or run.steps) - end)
    grown = continue_schedule(run, end, schedule, grow.steps, str(OUT))
    assert grown.steps > end and schedule.kind == ("rewarm" if end == 30 else "restart")


@pytest.mark.parametrize(
    ("tokenizer", "context"), [("mistral", 1024), ("bytes", 256), ("mistral", 512), ("bytes", 1024)]
)
def test_what_preparing_says_to_do_next(tokenizer, context, monkeypatch, tmp_path):
    """Its defaults are the first case. The model's context must be that of the data."""
    monkeypatch.chdir(tmp_path)
    config = parsed(next_command(OUT, tokenizer, context))
    assert config.data == str(OUT) and config.tokenizer is None  # the data knows it
    assert model_config(config, 32_000).context == context
