"""Comparing two models: the tests against their definitions, and what is refused."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from core.errors import UserError
from eval.compare import compare_pages, compare_task, compare_values, main, report
from eval.questions import read_scores, text_keys
from eval.results import Results, questions_file, read_results, unique_names

RNG = np.random.default_rng(5)


def flips(difference: np.ndarray, n: int = 20_000) -> float:
    """Two-sided p of a mean by flipping the signs of paired differences, which asks for no distribution."""
    signs = RNG.choice([-1.0, 1.0], (n, len(difference)))
    means = np.abs((signs * difference).mean(axis=1))
    return float((means >= abs(difference.mean()) - 1e-12).mean())


@pytest.mark.parametrize(
    ("only_first", "only_second", "both"), [(3, 9, 20), (0, 6, 4), (7, 7, 0), (1, 30, 100)]
)
def test_right_and_wrong_is_mcnemars_exact_test(only_first: int, only_second: int, both: int) -> None:
    first = np.array([1.0] * only_first + [0.0] * only_second + [1.0] * both)
    second = np.array([0.0] * only_first + [1.0] * only_second + [1.0] * both)
    found = compare_values(first, second)
    n, k = only_first + only_second, min(only_first, only_second)
    tail = sum(math.comb(n, i) for i in range(k + 1)) / 2**n
    assert found.p == pytest.approx(min(1.0, 2 * tail), rel=1e-9)
    assert (found.only_first, found.only_second) == (only_first, only_second)
    assert found.difference == pytest.approx((only_second - only_first) / (n + both))
    # The variance of a difference in {-1, 0, 1}, from its counts.
    mean = found.difference
    variance = (n / (n + both) - mean**2) * (n + both) / (n + both - 1)
    assert found.stderr == pytest.approx(math.sqrt(variance / (n + both)))
    # And it is the sign-flip test of the same differences. 20,000 flips know p to 0.0036 (one standard
    # error at 1/2): five of them.
    assert found.p == pytest.approx(flips(second - first), abs=0.018)


def test_no_question_answered_otherwise_is_no_difference() -> None:
    same = np.array([1.0, 0.0, 1.0])
    found = compare_values(same, same)
    assert (found.p, found.difference, found.stderr) == (1.0, 0.0, 0.0)


def test_a_difference_that_is_the_same_everywhere_has_no_noise() -> None:
    """Where the paired t-test would divide by zero."""
    shares = np.array([0.25, 0.5, 0.625])
    for shift, p in ((0.0, 1.0), (0.25, 0.0)):
        found = compare_values(shares, shares + shift)
        assert (found.p, found.difference, found.stderr, found.test) == (p, shift, 0.0, "paired t")


def test_shares_are_compared_in_pairs() -> None:
    """A small shift under a spread ten times as large is seen, which an unpaired test could not."""
    first = RNG.uniform(0.2, 0.8, 200)
    second = first + RNG.normal(0.01, 0.02, 200)
    found = compare_values(first, second)
    assert found.test == "paired t" and found.only_first is None
    assert found.p < 1e-4 and flips(second - first) < 1e-3
    unpaired = abs(found.difference) / math.sqrt(first.var(ddof=1) / 100)
    assert unpaired < 2
    weaker = compare_values(first[:12], second[:12] - (second - first)[:12].mean() + 0.008)
    # At 12 pairs of nearly normal differences, t-test and sign flips differ by a few hundredths.
    assert weaker.p == pytest.approx(
        flips(second[:12] - (second - first)[:12].mean() + 0.008 - first[:12]), abs=0.05
    )


def test_pages_are_compared_by_bits_a_byte() -> None:
    n_bytes = RNG.integers(500, 20_000, 60).astype(float)
    first = n_bytes * RNG.normal(1.3, 0.14, 60)
    second = first - n_bytes * RNG.normal(0.014, 0.014, 60)
    found = compare_pages(first, second, n_bytes)
    assert found.difference == pytest.approx((second.sum() - first.sum()) / n_bytes.sum())
    picks = RNG.integers(0, 60, (4000, 60))
    resampled = (second - first)[picks].sum(1) / n_bytes[picks].sum(1)
    # The bootstrap's spread of 60 pages is known to about 9% (1/sqrt(2 * 60)), the linearisation adds less.
    assert found.stderr == pytest.approx(resampled.std(), rel=0.25)
    assert found.p < 1e-3
    assert compare_pages(first, first, n_bytes).p == 1.0


def results(
    folder: Path,
    name: str,
    right: list[float],
    metric: str = "acc",
    salt: str = "",
    dtype: str = "float32",
    texts: list[str] | None = None,
    **model: Any,
) -> Path:
    """Results of a made-up task whose questions are answered so; texts: of each question; model: what else is
    recorded of it."""
    questions = [{"question": f"q{salt}{i % 7}", "id": i, metric: float(r)} for i, r in enumerate(right)]
    for row, text in zip(questions, texts or [], strict=False):
        row["text_keys"] = text_keys({"question": text, "choices": ["yes", "no"]})
    entry = {
        "version": 1.0, "shots": 0, "questions": len(right), "of": len(right), "requests_sha256": "",
        "files_sha256": {}, "chance": 0.25, "higher_is_better": {metric: True},
        "metrics": {metric: {"value": sum(right) / len(right), "stderr": 0.01}},
    }  # fmt: skip
    made = Results(
        folder / name,
        {"name": name, "sha256": name, "parameters": 1, "kind": "folder"} | model,
        {"dtype": dtype},
    )
    made.add(
        "task", {"seconds": 1.0, "truncated": 0, "tasks": {"task": entry}, "groups": {}}, {"task": questions}
    )
    return folder / name


def test_the_same_questions_are_paired_and_others_refused(tmp_path: Path) -> None:
    """Questions that are asked twice are told apart by their order."""
    a = results(tmp_path, "a", [1, 0, 1, 0, 1, 0, 1, 1, 1])
    b = results(tmp_path, "b", [1, 1, 1, 0, 1, 0, 1, 0, 1])
    found = compare_task(a, b, "task", ["acc"])[0]["acc"]
    assert (found.only_first, found.only_second) == (1, 1)
    other = results(tmp_path, "c", [1, 0, 1], salt="x")
    with pytest.raises(UserError, match=r"asked different questions in task \(0 of 9 and 3"):
        compare_task(a, other, "task", ["acc"])


def test_the_report_says_who_is_right_where(tmp_path: Path) -> None:
    folders = [results(tmp_path, "a", [1] * 4 + [0] * 10), results(tmp_path, "b", [0] * 4 + [1] * 10)]
    text = report(folders, [read_results(folder) for folder in folders])
    assert "| task | acc | 28.57 ± 1.00 | 71.43 ± 1.00 | v1.0, 0-shot, float32 |" in text
    assert "| task | acc | +42.86 ± 25.06 | 4 / 10 | 0.180 | McNemar |" in text
    assert unique_names(["a", "b", "a"]) == ["a [1]", "b", "a [3]"]
    assert "b against a, on the same questions:" in text and "different settings" not in text
    folders.append(results(tmp_path, "c", [1] * 14, dtype="bfloat16"))
    text = report(folders, [read_results(folder) for folder in folders])
    assert "under different settings (dtype, shots, questions, truncation): task." in text


def test_what_can_be_compared_is_and_the_rest_is_named(tmp_path: Path) -> None:
    """One task was evaluated with another --limit: it alone is left out."""
    folders = [results(tmp_path, "a", [1] * 4 + [0] * 10), results(tmp_path, "b", [0] * 4 + [1] * 10)]
    for folder, right in zip(folders, ([1, 0, 1], [1, 0, 1, 1]), strict=True):
        part = results(tmp_path / "parts", folder.name, right)
        content, other = read_results(folder), read_results(part)["evaluations"]["task"]
        content["evaluations"]["limited"] = other | {"tasks": {"limited": other["tasks"]["task"]}}
        (folder / "results.json").write_text(json.dumps(content))
        shutil.copy(part / "questions/task.jsonl", folder / "questions/limited.jsonl")
    text = report(folders, [read_results(folder) for folder in folders])
    assert "| task | acc | +42.86 ± 25.06 | 4 / 10 | 0.180 | McNemar |" in text
    (named,) = [line for line in text.splitlines() if line.startswith("Not compared: ")]
    assert "asked different questions in limited (3 of 3 and 4 are the same)" in named and "--limit" in named
    assert "number of tests: 1," in text


@pytest.mark.parametrize("metric", ["acc", "perplexity"])
def test_one_question_is_not_compared(tmp_path: Path, metric: str) -> None:
    """It shows no spread: a t-test of it had p = 0."""
    folders = [results(tmp_path, name, [right], metric) for name, right in (("a", 0), ("b", 1))]
    with pytest.raises(UserError, match=r"one question does not show .* larger --limit"):
        report(folders, [read_results(folder) for folder in folders])


def test_of_a_perplexity_the_logarithms_are_compared(tmp_path: Path) -> None:
    """The harness keeps the log-probability of each answer, of which perplexity is exp(-mean)."""
    a = results(tmp_path, "a", [-1.0, -2.0, -3.5], "perplexity")
    b = results(tmp_path, "b", [-1.0, -1.0, -3.0], "perplexity")
    found, _ = compare_task(a, b, "task", ["perplexity"])
    assert found["log perplexity"].difference == pytest.approx(-0.5)


def test_the_bits_of_pages_are_read_from_their_probabilities(tmp_path: Path) -> None:
    """Pages of 8, 24 and 8 bytes, of which b makes a quarter as many bits as a on the last."""
    bits = {"a": [8, 48, 32], "b": [8, 48, 8]}
    for name, of_pages in bits.items():
        rows = [{"question": f"page {i}", "logprob": -n * math.log(2), "bytes": size}
                for i, (n, size) in enumerate(zip(of_pages, (8, 24, 8), strict=True))]  # fmt: skip
        path = questions_file(results(tmp_path, name, [0, 0, 0]), "task")
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    scores, _ = read_scores([tmp_path / "a", tmp_path / "b"], "task", ["acc", "bits_per_byte"])
    assert scores.keys() == {"bits_per_byte"}
    np.testing.assert_allclose(scores["bits_per_byte"].values, [bits["a"], bits["b"]], rtol=1e-12)
    assert scores["bits_per_byte"].weights.tolist() == [8, 24, 8]
    found, _ = compare_task(tmp_path / "a", tmp_path / "b", "task", ["bits_per_byte"])
    assert found["bits_per_byte"].difference == pytest.approx(64 / 40 - 88 / 40)


def test_models_without_a_task_in_common_are_refused(tmp_path: Path) -> None:
    a = read_results(results(tmp_path, "a", [1, 0]))
    b = read_results(results(tmp_path, "b", [1, 0]))
    b["evaluations"] = {}
    with pytest.raises(UserError, match="no task in common"):
        report([tmp_path / "a", tmp_path / "b"], [a, b])


def test_only_a_comparison_is_replaced_by_one(tmp_path: Path, monkeypatch, capsys) -> None:
    """--out may be mistyped: the settings of a run were replaced by a table."""
    folders = [results(tmp_path, "a", [1] * 4 + [0] * 10), results(tmp_path, "b", [0] * 4 + [1] * 10)]
    for out in (tmp_path / "config.json", tmp_path / "b.md"):
        monkeypatch.setattr("sys.argv", ["compare", *map(str, folders), "--out", str(out)])
        if out.suffix == ".md":
            assert main() == 0 == main()  # its own is replaced
            assert "| task | acc |" in out.read_text()
        else:
            out.write_text("{}")
            with pytest.raises(UserError, match="exists and is no comparison: name another file"):
                main()
            assert out.read_text() == "{}"
    capsys.readouterr()
    monkeypatch.setattr("sys.argv", ["compare", *map(str, folders), "--out", str(tmp_path)])
    with pytest.raises(UserError, match="is a folder: name a file"):
        main()
    assert not capsys.readouterr().out


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda text: '{"a": 1}\n', "it has lines that are no questions"),
        (lambda text: "5\n", "it has lines that are no questions"),
        (lambda text: "".join(text.splitlines(keepends=True)[:5]), "it has 5 of 14 questions"),
        (lambda text: None, "is not there any more: evaluate the model again"),
    ],
)
def test_damaged_questions_are_named_and_asked_again(tmp_path: Path, damage, said: str) -> None:
    a = results(tmp_path, "a", [1] * 4 + [0] * 10)
    b = results(tmp_path, "b", [0] * 4 + [1] * 10)
    file = questions_file(b, "task")
    kept = Results(b, read_results(b)["model"], {"dtype": "float32"})
    assert kept.has("task", lambda task: {})
    text = damage(file.read_text())
    file.unlink() if text is None else file.write_text(text)
    with pytest.raises(UserError, match=said):
        compare_task(a, b, "task", ["acc"])
    assert not kept.has("task", lambda task: {})


def test_results_have_a_folder_of_one_model_and_of_nothing_else(tmp_path: Path) -> None:
    """A run's folder with results of another model stood for that model in comparisons."""
    identity = {"name": "a", "sha256": "a", "parameters": 1, "kind": "folder"}
    (tmp_path / "model").mkdir()
    (tmp_path / "model/model.safetensors").touch()
    with pytest.raises(UserError, match="is a folder of weights for PyTorch, and results have a folder of"):
        Results(tmp_path / "model", identity, {})
    (tmp_path / "perplexity.json").write_text(json.dumps({"a.txt": {"model": identity | {"sha256": "b"}}}))
    with pytest.raises(UserError, match=r"holds the results of another model \(a, sha256 b\)"):
        Results(tmp_path, identity, {})
