"""Held-out scores against a plain computation over the same text."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from core.data.batches import heldout_windows
from core.data.dataset import open_dataset
from core.data.prepare import prepare
from core.data.sequences import heldout_sets
from core.model import Compute, forward, init_params, logits
from core.sharding import make_mesh
from tests.models import LLAMA
from train_tpu.evaluate import Evaluator


def test_score_is_the_mean_over_every_predicted_token_of_the_text(tmp_path):
    text = "".join(f"line {i} of a text whose end does not fill a window.\n" for i in range(60))
    heldout = text[::-1][:1001]
    (tmp_path / "train.txt").write_text(text)
    (tmp_path / "heldout.txt").write_text(heldout)
    out = tmp_path / "prepared"
    valid = {"end": str(tmp_path / "heldout.txt")}
    prepare([str(tmp_path / "train.txt")], out, "bytes", context=16, valid=valid)
    dataset = open_dataset(out)
    config = dataclasses.replace(LLAMA, vocab_size=258, context=16)
    params = init_params(config, jax.random.key(3))
    # 7 rows fit no count.
    evaluator = Evaluator(config, Compute(), heldout_sets(dataset), rows=7, chunk=32, mesh=make_mesh())
    score = evaluator.score(params, "end")

    # The stream is <s>, the bytes, </s>; window i predicts positions 16 i + 1 to 16 i + 16 of it.
    stream = np.array([256, *heldout.encode(), 257])
    run = jax.jit(lambda tokens: logits(config, params, forward(config, params, tokens)))
    nll = []
    for start in range(0, len(stream) - 1, 16):
        window = stream[start : start + 17]
        scores = np.asarray(run(jnp.asarray(window[None, :-1]))[0], np.float64)
        log_z = np.log(np.exp(scores).sum(-1))
        nll += list(log_z - scores[np.arange(len(window) - 1), window[1:]])
    assert score.tokens == len(nll) == 1002
    # Float32 logits of size 1 against their float64 sums: 1e-7 relative, with room for 1,000 summands.
    np.testing.assert_allclose(score.nll, np.mean(nll), rtol=1e-5)
    np.testing.assert_allclose(score.bits_per_byte, np.sum(nll) / math.log(2) / 1001, rtol=1e-5)
    np.testing.assert_allclose(score.perplexity, math.exp(np.mean(nll)), rtol=1e-4)

    part = evaluator.score(params, "end", limit=3)
    tokens, mask = heldout_windows(dataset, "end", 3)
    assert part.tokens == mask.sum() and len(tokens) == 3
    assert evaluator.score(params, "end", interrupted=lambda: True) is None
