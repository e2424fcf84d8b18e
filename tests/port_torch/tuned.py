"""Folders that learned to converse in seconds, for all tests of a session."""

import contextlib
import dataclasses
import io
import json
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.checks import require
from tests.models import random_params
from tests.port_torch.folders import SMALL, write_export
from tests.port_torch.small_training import finetune_here

EXCHANGE = [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Yes."}]
OTHER = [{"role": "user", "content": "Bye?"}, {"role": "assistant", "content": "No."}]
ROWS = [EXCHANGE] * 3 + [EXCHANGE * 2 + EXCHANGE[:1], EXCHANGE * 6] + [OTHER] * 3
"""Among them one that nobody answers, and one that is longer than the context."""
CONTEXT = 160


class Tuned(NamedTuple):
    """A run of port_torch.finetune."""

    out: Path
    arguments: tuple
    """Of the command."""
    said: str

    @property
    def folder(self) -> Path:
        """The model."""
        return self.out / "model"


def tune(root: Path, kind: str, **changes: int) -> Tuned:
    """A model of a kind, tuned on 16 conversations; changes: of its config."""
    rows, config = root / "rows.jsonl", dataclasses.replace(SMALL[kind], context=CONTEXT, **changes)
    rows.write_text("".join(json.dumps({"messages": row}) + "\n" for row in ROWS * 2))
    start = write_export(root / "start", config, random_params(config, std=0.1))
    arguments = (
        start, "--data", rows, "--out", root / "out", "--validation", "0", "--steps", "24", "--batch", "2",
        "--lr", "0.01",
    )  # fmt: skip
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(said):
        require(finetune_here(patch, *arguments) == 0)
    return Tuned(root / "out", arguments, said.getvalue())
