"""Every figure against a second implementation: the model's formulas in float64, definitions by hand."""

import math
import re
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from eval.evaluate import _rolling
from eval.perplexity import measure_wikitext_words
from tests.eval.conftest import Evaluated, Made
from tests.eval.small_sets import Choice, Sets
from tests.models import flat
from tests.reference import logits64

# A float32 forward pass errs by some 1e-5 in a log-probability here (logits reach 30, a rounding is 2e-6);
# the errors of a continuation's tokens add up, 60 of them at most.
LOGPROB = 1e-3


class Reference:
    """A model in float64; texts are scored one by one."""

    def __init__(self, made: Made):
        self.config, self.tokenizer = made.config, made.tokenizer
        self.leaves = {name: torch.tensor(leaf).double() for name, leaf in flat(made.params).items()}
        self.n_truncated = 0

    def ids(self, text: str) -> list[int]:
        return [self.tokenizer.bos, *self.tokenizer.encode(text).tolist()]

    def logprob(self, ids: Sequence[int], n: int) -> float:
        """Of the last n of the ids behind the others."""
        scores = logits64(self.config, self.leaves, np.array([ids[:-1]]), last=n)[0].log_softmax(-1)
        return float(scores[range(n), list(ids[-n:])].sum())

    def choice(self, context: str, choice: str) -> float:
        """log P(" " + choice | context); spaces that end the context go to the choice."""
        stripped = context.rstrip()
        whole = self.ids(f"{context} {choice}")
        n = len(whole) - len(self.ids(stripped))
        self.n_truncated += len(whole) > self.config.context + 1
        return self.logprob(whole[-self.config.context - 1 :], n)

    def document(self, text: str) -> tuple[float, float]:
        """(log P of `<s>` and the text behind `<s>`, that of `<s>` alone).

        As many ids at a time as the context holds, behind the one before them; the last ones, which are
        fewer, behind as many as fit.
        """
        bos, context = self.tokenizer.bos, self.config.context
        ids = [bos, *self.ids(text)]
        total = 0.0
        for start in range(1, len(ids), context):
            end = min(start + context, len(ids))
            total += self.logprob(ids[max(0, end - context - 1) : end], end - start)
        return total, self.logprob([bos, bos], 1)


@pytest.fixture(scope="session")
def reference(made: Made) -> Reference:
    return Reference(made)


@pytest.fixture(scope="session")
def choices(reference: Reference, sets: Sets) -> dict[str, list[list[float]]]:
    """The log-probability of every choice of every question."""
    return {
        task: [
            [reference.choice(question.context, choice) for choice in question.choices] for question in rows
        ]
        for task, rows in sets.questions.items()
    }


@pytest.mark.parametrize("adapter", ["flax", "torched"])
def test_choices(adapter, choices, sets, request):
    """Log-probabilities, acc and acc_norm of ARC, OpenBookQA and TruthfulQA's mc1, question by question."""
    evaluated: Evaluated = request.getfixturevalue(adapter)
    seen = set()
    for task in ("arc_easy", "openbookqa", "truthfulqa_mc1"):
        rows, questions = sets.questions[task], evaluated.questions[task]
        entry = evaluated.records[task]["tasks"][task]
        metrics = entry["metrics"]
        assert entry["chance"] == pytest.approx(np.mean([1 / len(row.choices) for row in rows]))
        sums = {"acc": 0, "acc_norm": 0}
        for expected, row, found in zip(choices[task], rows, questions, strict=True):
            np.testing.assert_allclose(found["logprobs"], expected, rtol=0, atol=LOGPROB)
            assert found["target"] == row.right[0]
            scored = {
                "acc": right_by(expected, row),
                "acc_norm": right_by([x / len(c) for x, c in zip(expected, row.choices, strict=True)], row),
            }
            if task == "truthfulqa_mc1":
                del scored["acc_norm"]
            assert {name: found[name] for name in scored} == scored
            for name, value in scored.items():
                sums[name] += value
            seen |= {tuple(scored.values())}
        assert metrics["acc"]["value"] == pytest.approx(sums["acc"] / len(rows), abs=1e-12)
        assert 0 < sums["acc"] < len(rows), "questions all right or all wrong prove little"
        if task != "truthfulqa_mc1":
            assert metrics["acc_norm"]["value"] == pytest.approx(sums["acc_norm"] / len(rows), abs=1e-12)
    assert {(0, 1), (1, 0)} <= seen, "no question where the length of a choice decides, both ways"


def right_by(scores: list[float], row: Choice) -> int:
    return int(max(range(len(scores)), key=scores.__getitem__) in row.right)


@pytest.mark.parametrize("adapter", ["flax", "torched"])
def test_mc2(adapter, choices, sets, request):
    """The share of the probability of all answers that the true ones have."""
    evaluated: Evaluated = request.getfixturevalue(adapter)
    shares = []
    for expected, row in zip(choices["truthfulqa_mc2"], sets.questions["truthfulqa_mc2"], strict=True):
        weights = [math.exp(x - max(expected)) for x in expected]
        shares.append(sum(weights[i] for i in row.right) / sum(weights))
    found = [row["acc"] for row in evaluated.questions["truthfulqa_mc2"]]
    # Of a share p the derivative by a log-probability is p(1 - p) at most.
    np.testing.assert_allclose(found, shares, rtol=0, atol=LOGPROB / 4 * 2)
    assert min(shares) < 0.3 and max(shares) > 0.7
    value = evaluated.records["truthfulqa_mc2"]["tasks"]["truthfulqa_mc2"]["metrics"]["acc"]["value"]
    assert value == pytest.approx(np.mean(shares), abs=LOGPROB / 2)


@pytest.mark.parametrize("adapter", ["flax", "torched"])
def test_truncation_is_counted(adapter, reference, choices, sets, request):
    """TruthfulQA's prompt does not fit into the one model's context."""
    evaluated: Evaluated = request.getfixturevalue(adapter)
    counted = sum(record["truncated"] for record in evaluated.records.values())
    assert counted == reference.n_truncated
    if reference.tokenizer.name == "bytes":
        assert counted == sum(
            len(row.choices) for t in sets.questions if "truth" in t for row in sets.questions[t]
        )
    else:
        assert counted == 0


@pytest.mark.parametrize("adapter", ["flax", "torched"])
def test_rolling_perplexities(adapter, reference, sets, request):
    """WikiText a page: words and bytes of the original, the detokenised text scored, `<s>` once."""
    evaluated: Evaluated = request.getfixturevalue(adapter)
    entry = evaluated.records["wikitext"]["tasks"]["wikitext"]
    scores = [reference.document(page.detokenised) for page in sets.pages]
    lengths = [len(reference.ids(page.detokenised)) for page in sets.pages]
    assert max(lengths) > 2 * reference.config.context and min(lengths) < reference.config.context
    nats, bos = -sum(score for score, _ in scores), -sum(of_bos for _, of_bos in scores)
    words = sum(len(re.split(r"\s+", page.raw)) for page in sets.pages)
    n_bytes = sum(len(page.raw.encode()) for page in sets.pages)
    assert (entry["words"], entry["bytes"]) == (words, n_bytes)
    found = [row["logprob"] for row in evaluated.questions["wikitext"]]
    # A page has up to 20 times the tokens of the longest choice; independent errors make sqrt(20) of it.
    np.testing.assert_allclose(found, [score for score, _ in scores], rtol=0, atol=5 * LOGPROB)
    metrics = {name: metric["value"] for name, metric in entry["metrics"].items()}
    assert metrics["word_perplexity"] == pytest.approx(math.exp(nats / words), rel=1e-4)
    assert metrics["byte_perplexity"] == pytest.approx(math.exp(nats / n_bytes), rel=1e-5)
    assert metrics["bits_per_byte"] == pytest.approx(nats / n_bytes / math.log(2), rel=1e-5)
    assert entry["bos_nats"] == pytest.approx(bos, abs=LOGPROB) and bos > 1
    assert entry["word_perplexity_without_bos"] == pytest.approx(math.exp((nats - bos) / words), rel=1e-4)
    assert entry["bits_per_byte_without_bos"] == pytest.approx((nats - bos) / n_bytes / math.log(2), rel=1e-5)


def test_words_of_wikitext_are_those_of_the_original_pages(torched, reference, sets):
    """eval.perplexity's figures: of detokenised pages, per word of the original."""
    found = measure_wikitext_words(torched.model, sets.folder)
    scores = [reference.document(page.detokenised) for page in sets.pages]
    nats, bos = -sum(score for score, _ in scores), -sum(of_bos for _, of_bos in scores)
    words = sum(len(re.split(r"\s+", page.raw)) for page in sets.pages)
    n_bytes = sum(len(page.raw.encode()) for page in sets.pages)
    assert (found["words"], found["bytes"]) == (words, n_bytes)
    assert (found["nats"], found["bos_nats"]) == pytest.approx((nats, bos), rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(nats / words), rel=1e-4)
    assert found["perplexity_without_bos"] == pytest.approx(math.exp((nats - bos) / words), rel=1e-4)
    assert found["bits_per_byte"] == pytest.approx(nats / n_bytes / math.log(2), rel=1e-5)


def test_the_error_of_bits_a_byte_is_the_jackknife_s():
    """A ratio of sums over documents: leaving each out in turn gives the same error, to first order.

    Without document i the ratio moves by r_i / (B - b_i), where the formula has r_i / B (1 - 1/n): the two
    differ by a factor between (1 - 1/n) / (1 - h_i) over the documents' shares h_i = b_i / B, and what the
    moves have for a mean is of second order.
    """
    rng = np.random.default_rng(3)
    n = 62
    n_bytes = rng.integers(5_000, 40_000, n)
    nats = n_bytes * rng.normal(0.8, 0.1, n)
    rows = [
        {"logprob": -x, "bytes": int(b), "words": int(b) // 5} for x, b in zip(nats, n_bytes, strict=True)
    ]
    found = _rolling(rows, bos_nats=62.0)
    left_out = (nats.sum() - nats) / (n_bytes.sum() - n_bytes) / math.log(2)
    jackknife = math.sqrt((n - 1) / n * ((left_out - left_out.mean()) ** 2).sum())
    shares = n_bytes / n_bytes.sum()
    low, high = (1 - 1 / n) / (1 - shares.min()), (1 - 1 / n) / (1 - shares.max())
    assert 0.97 < low < high < 1.03
    assert low - 1e-3 < jackknife / found["bits_per_byte_stderr"] < high
    assert _rolling(rows[:1], bos_nats=1.0)["bits_per_byte_stderr"] == pytest.approx(0, abs=1e-12)
