"""What an earlier version wrote opens for ever: prepared data, runs and exports of commit 7b5e0bc.

tests/fixtures/7b5e0bc/README.md has the commands. expected.json holds what that commit made of them: the
batch at sequence 48, the logits of each export, and the losses of the last four updates of each run.
"""

import hashlib
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from core.checkpoint.checkpointer import restore_params
from core.checkpoint.manifest import load_manifest
from core.checkpoint.steps import find_step
from core.config import ModelConfig
from core.data.batches import train_batches
from core.data.dataset import open_dataset, open_windows
from core.model import abstract_params
from core.run.log import read_log
from port_torch.formats import exported
from port_torch.model import load
from tests.models import whole_logits
from tests.train_tpu.processes import run

FIXTURES = Path(__file__).parent / "fixtures" / "7b5e0bc"
EXPECTED = json.loads((FIXTURES / "expected.json").read_text(encoding="utf-8"))
PROMPT = [256, *b"The model reads"]  # <s> and bytes


def test_prepared_data_is_the_text_and_in_the_same_order():
    dataset = open_dataset(FIXTURES / "data")
    assert dataset.fingerprint == EXPECTED["fingerprint"]

    windows = open_windows(dataset, "train").read([0, 1], vocab_size=258)
    text = (FIXTURES / "text.txt").read_bytes()
    assert [256, *text[:64]] == windows[0].tolist() and [*text[63:128]] == windows[1].tolist()

    batches = train_batches(dataset, seed=0, batch=4, start=48, vocab_size=258)
    batch = next(batches)
    batches.close()
    assert batch.records.tolist() == EXPECTED["batch_at_48"]["records"]
    assert (
        hashlib.sha256(batch.tokens.astype("<u2").tobytes()).hexdigest() == EXPECTED["batch_at_48"]["sha256"]
    )


@pytest.mark.parametrize("name", ["mtlm1", "mtlm2"])
def test_checkpoint_export_and_their_logits(name: str):
    step_dir = find_step(FIXTURES / name)
    config = ModelConfig(**load_manifest(step_dir).config["model"])
    params = restore_params(step_dir, abstract_params(config))

    imported = exported.read(FIXTURES / f"{name}-export")
    assert imported.config == config
    jax.tree.map(np.testing.assert_array_equal, params, imported.params)

    ours = np.asarray(whole_logits(config, params, jnp.array([PROMPT])))[0, -1, :16]
    with torch.no_grad():
        mirror = load(FIXTURES / f"{name}-export").eval()
        mirrored = mirror.logits(mirror(torch.tensor([PROMPT])))[0, -1, :16].numpy()
    # float32: 16 tokens through two layers of width 32 are some hundred roundings of values below 4, each at
    # most 2.4e-7; the seven decimals of expected.json add 5e-8.
    np.testing.assert_allclose(ours, EXPECTED[name]["logits"], atol=2e-5, rtol=0)
    np.testing.assert_allclose(mirrored, EXPECTED[name]["logits"], atol=2e-5, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "module", "arguments"),
    [
        ("mtlm1", "train_tpu.run", []),
        ("mtlm2", "train_tpu.run", ["--preset", "mtlm2-tiny"]),
        ("torch", "port_torch.train", []),
    ],
)
def test_a_resumed_run(name: str, module: str, arguments: list[str], cache: Path, tmp_path: Path):
    out = tmp_path / name
    shutil.copytree(FIXTURES / name, out)
    run(cache, "--out", out, "--data", FIXTURES / "data", *arguments, module=module)
    losses = {row["step"]: row["nll"] for row in read_log(out, "train")}
    assert sorted(losses) == list(range(16))
    # To the bit with the same packages; another XLA or PyTorch may add in another order, and four updates of
    # rate 0.01 make a difference of float32's rounding, 1e-7, at most some hundred times as large.
    for step, loss in EXPECTED[name]["losses"].items():
        assert losses[int(step)] == pytest.approx(loss, rel=1e-4), step
