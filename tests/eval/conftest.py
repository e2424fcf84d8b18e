"""Models and sets that every test here may use, and what both adapters make of them."""

import contextlib
import dataclasses
import io
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from core.checkpoint.checkpointer import save_params
from core.checkpoint.steps import step_path
from core.config import ModelConfig
from core.model import Params
from core.tokenizer import Tokenizer, load_tokenizer, tokenizer_record
from eval.evaluate import Record, evaluate_task
from eval.harness import HarnessModel
from eval.models import open_model
from eval.tasks import open_tasks
from port_torch import convert
from tests.eval.small_sets import Sets, write_sets
from tests.models import GPT, LLAMA, random_params
from tests.port_torch.folders import manifest_of

torch.set_num_threads(1)  # small products: threads only wait for each other

SMALL = {"d_model": 32, "n_layers": 2, "n_heads": 2, "d_mlp": 48}
# One fits TruthfulQA's prompt into its context, the other does not.
KINDS = {
    "llama": (dataclasses.replace(LLAMA, context=256, vocab_size=32_000, **SMALL), "mistral"),
    "gpt": (dataclasses.replace(GPT, context=320, vocab_size=258, **SMALL), "bytes"),
}
TASKS = ["arc_easy", "openbookqa", "truthfulqa_mc1", "truthfulqa_mc2", "wikitext"]


class Made(NamedTuple):
    """A model of random parameters, as a run with one checkpoint and as the folder exported from it."""

    config: ModelConfig
    params: Params
    tokenizer: Tokenizer
    run: Path
    folder: Path


class Evaluated(NamedTuple):
    """What an adapter made of the small sets."""

    model: HarnessModel
    records: dict[str, Record]
    questions: dict[str, list[Record]]


@pytest.fixture(scope="session", autouse=True)
def remote_code(modules: Path) -> None:
    """The code of exported folders is copied to where it is removed again."""


@pytest.fixture(scope="session")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Sets:
    """The small sets."""
    return write_sets(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session", params=[pytest.param("llama", marks=pytest.mark.slow), "gpt"])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A model, of both kinds in turn; the one with 32,000 ids takes longer than quick tests may."""
    return make(tmp_path_factory.mktemp("made"), request.param, *KINDS[request.param])


def make(folder: Path, kind: str, config: ModelConfig, name: str) -> Made:
    """Random parameters as a run and as the folder that the command exports; name: of the tokenizer."""
    params, tokenizer = random_params(config), load_tokenizer(name)
    manifest = dataclasses.replace(manifest_of(config), tokenizer=tokenizer_record(tokenizer))
    run, out = folder / f"run-{kind}", folder / f"folder-{kind}"
    checkpoints = run / "checkpoints"
    checkpoints.mkdir(parents=True)
    save_params(step_path(checkpoints, manifest.step), params, manifest)
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()):
        patch.setattr("sys.argv", ["convert", str(run), str(out)])
        convert.main()
    return Made(config, params, tokenizer, run, out)


@pytest.fixture(scope="session")
def flax(made: Made, sets: Sets) -> Evaluated:
    """The small sets by our JAX adapter, on the checkpoint."""
    return evaluate(made.run, sets.folder)


@pytest.fixture(scope="session")
def torched(made: Made, sets: Sets) -> Evaluated:
    """The same by our PyTorch adapter, on the folder."""
    return evaluate(made.folder, sets.folder, device="cpu")


def evaluate(
    path: Path, data: Path, tasks: list[str] = TASKS, device: str = "auto", limit: int | None = None
) -> Evaluated:
    """Every task by our own adapter."""
    opened = open_model(path, "float32", device)
    model = HarnessModel(opened.backend, opened.tokenizer)
    records, questions = {}, {}
    with open_tasks(tasks, data) as found:
        for name in tasks:
            records[name], scored = evaluate_task(model, found, name, limit=limit)
            questions |= scored
    return Evaluated(model, records, questions)
