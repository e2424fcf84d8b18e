"""The command line of a training run over the settings of the run that it resumes."""

import dataclasses
import itertools
from pathlib import Path
from typing import TypeVar

from core.tokenizer import BUILT_IN, find_tokenizer
from train_tpu import config as settings
from train_tpu.run_folder import read_config

Settings = TypeVar("Settings")


def settings_of_run(folder: Path, default: Settings, argv: list[str]) -> Settings:
    """Those of the run in `folder`, for a command line to go over.

    `default` where there is no run, and for what is said of one start alone.
    """
    record = read_config(folder)
    if not record:
        return default
    once = {name: getattr(default, name) for name in settings.ONCE}
    saved = dataclasses.replace(settings.unflatten(record["run"], type(default)), **once)
    if record["tokenizer"]["name"] not in BUILT_IN and given_value(argv, "--tokenizer") is None:
        carriers = (folder, Path(saved.data))
        own = find_tokenizer(record["tokenizer"], carriers, f"the run in {folder}")
        saved = dataclasses.replace(saved, tokenizer=own)
    return dataclasses.replace(saved, steps=None) if given_value(argv, "--epochs") else saved


def given_value(argv: list[str], flag: str) -> str | None:
    """The value that the command line gives a flag, before it is parsed."""
    values = [value for name, value in itertools.pairwise(argv) if name == flag]
    values += [text.partition("=")[2] for text in argv if text.startswith(f"{flag}=")]
    return values[-1] if values else None
