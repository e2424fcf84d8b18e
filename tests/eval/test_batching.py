"""Rows in batches: every one scored once, whatever the batches are; few shapes; what does not fit, cut."""

import json
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from lm_eval.api.instance import Instance

from core.errors import UserError
from eval.batching import WIDTHS, Batch, Row, Scores, batches, score_rows
from eval.harness import HarnessModel
from tests.eval.conftest import Made
from tests.eval.small_sets import Sets
from tests.eval.test_equality import LOGPROB, hf_model
from tests.several_devices import run_on_devices

CONTEXT = 100


def score(prefix, target: int) -> tuple[float, bool]:
    """A model of any kind: depends on every token before the target, on their number and on the target."""
    value = zlib.crc32(np.array([*prefix, target], np.int32).tobytes())
    return -(value % 1009) / 128, value % 8 > 0


class Hashing:
    """Scores by `score`, of what is in the batch before each place."""

    def __init__(self, budget: int, n_devices: int, compiled: bool = True):
        self.context, self.budget, self.n_devices, self.compiled = CONTEXT, budget, n_devices, compiled
        self.batches: list[Batch] = []

    def start(self, batch: Batch) -> list[tuple[float, bool]]:
        self.batches.append(batch)
        lines, positions = np.divmod(batch.place, batch.tokens.shape[1])
        pairs = zip(lines, positions, batch.target, strict=True)
        return [score(batch.tokens[line, : position + 1], target) for line, position, target in pairs]

    def finish(self, started: list[tuple[float, bool]]) -> Scores:
        return Scores(*(np.array(column) for column in zip(*started, strict=True)))


def make_rows(n: int, seed: int = 0) -> list[Row]:
    """Rows of all lengths up to the context, with one to all of their predictions to score."""
    rng = np.random.default_rng(seed)
    lengths = [1, CONTEXT, *rng.integers(1, CONTEXT + 1, n - 2)]
    rows = []
    for length in lengths:
        ids = rng.integers(1, 50, length + 1).tolist()
        rows.append(Row(ids[:-1], ids[1:][-int(rng.integers(1, length + 1)) :]))
    return rows


@pytest.mark.parametrize("n_devices", [1, 8])
@pytest.mark.parametrize("budget", [1, 250, 3072])
@pytest.mark.parametrize("n", [2, 157])
@pytest.mark.parametrize("compiled", [True, False])
def test_every_row_is_scored_once(n, budget, n_devices, compiled):
    """Log-probabilities and likeliest tokens as one row after the other gives them."""
    rows, backend, reports = make_rows(n), Hashing(budget, n_devices, compiled), []
    totals, greedy = score_rows(backend, rows, reports.append)
    for row, total, all_greedy in zip(rows, totals, greedy, strict=True):
        first = len(row.inputs) - len(row.targets) + 1
        found = [score(row.inputs[: first + i], target) for i, target in enumerate(row.targets)]
        assert total == sum(value for value, _ in found)  # multiples of 1/128: exact
        assert all_greedy == all(likeliest for _, likeliest in found)
    assert {True, False} == set(greedy.tolist()) or n == 2
    assert sum(reports) == sum(len(row.inputs) for row in rows)
    assert len(reports) == len(backend.batches)

    shapes = {batch.tokens.shape for batch in backend.batches}
    widths = {width for _, width in shapes}
    if compiled:
        assert widths <= {*WIDTHS, CONTEXT}
        assert len(shapes) == len(widths)
    else:  # padded to the longest row of the batch, and no further; no row for nothing but for the devices
        assert all(width == max(len(rows[i].inputs) for i in set(batch.row))
                   for batch in backend.batches for width in batch.tokens.shape[1:])  # fmt: skip
        assert all(len(batch.tokens) - len(set(batch.row)) < n_devices for batch in backend.batches)
    for n_rows, width in shapes:
        assert n_rows % n_devices == 0
        assert n_rows * width <= budget or n_rows == n_devices
    if (
        budget == 3072 and n == 157 and compiled
    ):  # none is padded to more than the next width, and few rows are empty
        assert len(backend.batches) <= sum(len(row.inputs) + 32 for row in rows) / budget + len(widths) + 1


def test_the_longest_come_first():
    """What does not fit into memory is known at once."""
    widths = [batch.tokens.shape[1] for batch in batches(make_rows(60), CONTEXT, 400, 1)]
    assert widths == sorted(widths, reverse=True) and widths[0] == CONTEXT


def test_no_rows():
    totals, greedy = score_rows(Hashing(250, 1), [])
    assert len(totals) == len(greedy) == 0


@pytest.mark.parametrize("bad", [np.nan, -np.inf])
def test_what_is_not_finite_is_refused(bad):
    """In a batch that is not the first, at one place of it."""

    class Failing(Hashing):
        def finish(self, started):
            scores = super().finish(started)
            if len(self.batches) == 3:
                scores.logprob[-1] = bad
            return scores

    with pytest.raises(UserError, match="not finite"):
        score_rows(Failing(250, 1), make_rows(20))


def test_truncation_is_the_harness_s(made: Made, torched, flax):
    """Around the length that just fits: context + 1 ids, of which the last is only predicted."""
    context = made.config.context
    rng = np.random.default_rng(0)
    requests = []
    for length in (context - 1, context, context + 1, context + 2, 3 * context):
        for n in (1, 7, context):
            if n < length:
                ids = rng.integers(0, made.config.vocab_size, length).tolist()
                requests.append((("", ""), ids[:-n], ids[-n:]))
    hf = hf_model(made.folder, batch_size=4)
    for length in (5, context):  # what the model itself goes on with, twice
        ids = rng.integers(0, made.config.vocab_size, length).tolist()
        for _ in range(2):
            ids.append(int(hf._model_call(torch.tensor([ids[-context:]]))[0, -1].argmax()))
        requests.append((("", ""), ids[:-2], ids[-2:]))
    expected = hf._loglikelihood_tokens(requests, disable_tqdm=True)
    for ours in (torched.model, flax.model):
        ours.n_truncated = 0
        found = ours._loglikelihood_tokens(requests)
        np.testing.assert_allclose([x for x, _ in found], [x for x, _ in expected], rtol=0, atol=5 * LOGPROB)
        assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
        assert {greedy for _, greedy in found} == {True, False}
        assert ours.n_truncated == sum(
            len(before) + len(after) > context + 1 for _, before, after in requests
        )
        assert 0 < ours.n_truncated < len(requests)


def test_a_continuation_that_cannot_be_scored_is_refused(torched):
    """Longer than the context, or empty; the harness's model stops with an assertion there."""
    model: HarnessModel = torched.model
    model.task = "some_task"
    for continuation, why in (
        (" word" * 2000, "longer than the model's context"),
        ("", "empty continuation"),
    ):
        with pytest.raises(UserError, match=f"some_task has .*{why}"):
            model.loglikelihood([Instance("loglikelihood", {}, ("A context", continuation), 0)])


@pytest.mark.slow
def test_eight_devices(made: Made, flax, sets: Sets, tmp_path: Path):
    """Rows and places split over eight devices give the numbers of one."""
    expected = tmp_path / "expected.json"
    expected.write_text(json.dumps(flax.questions))
    script = Path(__file__).with_name("evaluate_on_devices.py")
    printed = run_on_devices(8, script, str(made.run), str(sets.folder), str(expected))
    assert "8 devices" in printed
