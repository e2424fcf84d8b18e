"""`eval.compare --a RUN ... --b RUN ...`: the table, what is left out, and what is refused."""

import re
from pathlib import Path

import numpy as np
import pytest

from core.data.dataset import open_dataset
from core.data.overlap import LOOKED_FOR, RECORD, merged, text_key
from core.errors import UserError
from eval.compare import main
from tests.core.data.test_prepare import write_jsonl
from tests.eval.test_compare import results
from train_tpu import prepare

LONG = [f"number {i} " + " ".join(f"word{i}x{j}" for j in range(15)) for i in range(40)]


def compare(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> None:
    """The command."""
    monkeypatch.setattr("sys.argv", ["compare", *map(str, arguments)])
    assert main() == 0


def training(seed: int, lr: float = 0.1, data: str = "f") -> dict:
    return {"seed": seed, "data": [data], "settings": {"lr": lr, "steps": 10}}


def recipes(folder: Path, lr: float = 0.1, n: int = 40, **options) -> list[Path | str]:
    """Arguments: three runs of A, right in about half of the questions, and two of B, right in more."""
    rng = np.random.default_rng(6)
    common = rng.random(n)
    arguments: list[Path | str] = []
    for side, seeds, chance in (("a", (0, 1, 2), 0.4), ("b", (0, 1), 0.7)):
        arguments.append(f"--{side}")
        for seed in seeds:
            right = (0.7 * common + 0.3 * rng.random(n) < chance).astype(float).tolist()
            known = {"training": training(seed, lr if side == "b" else 0.1)} | options
            arguments.append(results(folder, f"{side}{seed}", right, **known))
    return arguments


def right_of(folder: Path) -> np.ndarray:
    """Right or wrong of each question in results."""
    found = re.findall(r'"acc": ([01])', (folder / "questions/task.jsonl").read_text())
    return np.array(found, float)


def cells(text: str) -> list[str]:
    """Of the one line of the table."""
    (line,) = [line for line in text.splitlines() if line.startswith("| task | acc |")]
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_table_of_two_recipes(tmp_path: Path, monkeypatch, capsys):
    arguments = recipes(tmp_path)
    compare(monkeypatch, *arguments, "--out", tmp_path / "page.md")
    text = capsys.readouterr().out
    assert (tmp_path / "page.md").read_text() in text
    assert "A: a0, a1, a2 (seeds 0, 1, 2)\n" in text and "B: b0, b1 (seeds 0, 1)\n" in text
    a = np.array([right_of(path) for path in arguments[1:4]])
    b = np.array([right_of(path) for path in arguments[5:7]])
    found = cells(text)
    assert found[2] == f"{100 * a.mean():.2f} ({100 * a.mean(1).std(ddof=1):.2f})"
    assert found[4].startswith(f"+{100 * (b.mean() - a.mean()):.2f} ± ")
    low, high = map(float, found[5].split(" to "))
    assert (low + high) / 2 == pytest.approx(100 * (b.mean() - a.mean()), abs=0.011)  # of rounding
    assert (float(found[6]) < 0.05) == (low > 0)
    assert 1 <= float(found[7]) <= 3 and found[8].endswith("%") and int(found[9]) >= 2
    assert found[10] == "v1.0, 0-shot, float32"
    assert "number of tests: 1," in text and "not the training seed" not in text


def test_what_differs_besides_the_seed_is_said(tmp_path: Path, monkeypatch, capsys):
    arguments = recipes(tmp_path)
    odd = results(tmp_path, "odd", right_of(arguments[1]).tolist(), training=training(7, lr=0.2))
    compare(monkeypatch, *arguments, odd)
    text = capsys.readouterr().out
    assert "B: b0, b1, odd (seeds 0, 1, 7). They differ in more than the seed: lr\n" in text
    unknown = results(tmp_path, "older", right_of(arguments[1]).tolist())
    compare(monkeypatch, *arguments, unknown)
    assert "B: b0, b1, older. Their results do not record how they were trained" in capsys.readouterr().out


def test_runs_that_began_with_one_model_are_named(tmp_path: Path, monkeypatch, capsys):
    """Their seeds are several, that of what they began with is one, and its noise shows nowhere."""
    arguments: list[Path | str] = []
    for side in "ab":
        arguments.append(f"--{side}")
        for seed in (0, 1):
            start = "base/checkpoints/00000010" if side == "b" else f"base{seed}/checkpoints/00000010"
            known = training(seed) | {"began_with": start}
            arguments.append(results(tmp_path, f"{side}{seed}", [1, 0, seed, 1], training=known))
    compare(monkeypatch, *arguments)
    said = [line for line in capsys.readouterr().out.splitlines() if "all began with" in line]
    assert len(said) == 1 and said[0].startswith("b0, b1 all began with base/checkpoints/00000010: ")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Prepared data that has two of the questions, and was asked for all of them."""
    items = write_jsonl(tmp_path / "items.jsonl", [*LONG, "short"])
    text = write_jsonl(tmp_path / "text.jsonl", [f"So: {LONG[3]}!", LONG[8].upper(), *["other words"] * 40])
    out = tmp_path / "data"
    prepare.main([
        text, "--out", str(out), "--tokenizer", "bytes", "--context", "16", "--overlap", "count",
        "--eval-items", items,
    ])  # fmt: skip
    return out


def test_questions_in_the_training_text_are_left_out(tmp_path: Path, data: Path, monkeypatch, capsys):
    texts = [*LONG[:-1], "short"]
    fingerprint = open_dataset(data).fingerprint
    arguments = recipes(tmp_path, texts=texts)
    kept = np.delete(np.arange(40), [3, 8])
    a = np.array([right_of(path)[kept] for path in arguments[1:4]])
    compare(monkeypatch, *arguments, "--without-overlap", data)
    text = capsys.readouterr().out
    assert cells(text)[2] == f"{100 * a.mean():.2f} ({100 * a.mean(1).std(ddof=1):.2f})"
    assert f"task: 2 of 40 questions share 13 words in a row with {data} and are left out; 1 have" in text
    assert "a0 was trained on data that is not in" in text
    compare(monkeypatch, arguments[1], arguments[5], "--without-overlap", data)
    text = capsys.readouterr().out
    right = right_of(arguments[1])[kept], right_of(arguments[5])[kept]
    assert f"| {int((right[0] > right[1]).sum())} / {int((right[0] < right[1]).sum())} |" in text
    assert "task: 2 of 40 questions share" in text and "The table of scores has all questions." in text
    told = {"training": training(0, data=fingerprint), "lineage": ["grow"]}
    known = recipes(tmp_path / "known", texts=texts, **told)
    compare(monkeypatch, known[1], known[5], "--without-overlap", data)
    text = capsys.readouterr().out
    assert "was trained on data" not in text and "began with" not in text
    tuned = results(
        tmp_path, "tuned", right_of(known[1]).tolist(), texts=texts, **told | {"lineage": ["train"]}
    )
    compare(monkeypatch, known[1], tuned, "--without-overlap", data)
    assert "tuned began with the parameters of another model: " in capsys.readouterr().out
    results(tmp_path / "other", "a0", right_of(known[1]).tolist(), texts=texts)
    compare(monkeypatch, known[1], tmp_path / "other/a0", "--without-overlap", data)
    assert "What a0 was trained on is not recorded in its results.\n" in capsys.readouterr().out
    both = [results(tmp_path / "seen", name, [1, 0], texts=[LONG[3], LONG[8]], **told) for name in ("a", "b")]
    with pytest.raises(UserError, match="every question of task shares 13 words in a row with"):
        compare(monkeypatch, *both, "--without-overlap", data)


@pytest.mark.slow
def test_appended_text_counts_and_what_was_not_compared_is_refused(tmp_path: Path, data: Path, monkeypatch):
    more = write_jsonl(tmp_path / "more.jsonl", [LONG[20], *["yet other words"] * 40])
    items = write_jsonl(tmp_path / "new-items.jsonl", [*LONG[:30], "never asked before " * 13])
    options = ["--append", str(data), "--overlap", "count", "--eval-items", items]
    prepare.main([more, *options])
    record = open_dataset(data / "v2").overlap_record()
    # What was looked for in both, and what either has.
    assert sorted(record["text"].tolist()) == sorted(map(text_key, LONG[:30]))
    assert set(record["text"][record["shared"]].tolist()) == {text_key(LONG[i]) for i in (3, 8, 20)}
    prepare.main([write_jsonl(tmp_path / "last.jsonl", ["without a look " * 9] * 9), "--append", str(data)])
    assert open_dataset(data / "v3").overlap_record() is None
    arguments = recipes(tmp_path, texts=LONG)
    with pytest.raises(UserError, match=r"data/v3 does not record .*: prepare the same text with --overlap"):
        compare(monkeypatch, *arguments, "--without-overlap", data)
    with pytest.raises(
        UserError, match=r"the texts of task were not looked for in .*v2: write them with eval"
    ):
        compare(monkeypatch, *arguments, "--without-overlap", data / "v2")
    with pytest.raises(UserError, match="evaluated by an older version, which kept no hashes of its texts"):
        compare(monkeypatch, *recipes(tmp_path / "old"), "--without-overlap", data / "v2")


def test_the_record_is_sealed_and_records_are_merged(data: Path):
    record = np.load(data / RECORD)
    assert len(record) == 40 and record["shared"].sum() == 2
    content = bytearray((data / RECORD).read_bytes())
    content[-1] ^= 1
    (data / RECORD).write_bytes(content)
    with pytest.raises(UserError, match="is corrupt"):
        open_dataset(data)
    one = np.array([(5, True), (3, False)], LOOKED_FOR)
    other = np.array([(3, True)], LOOKED_FOR)
    assert merged([one, other]).tolist() == [(3, True), (5, True)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: ["nonesuch", *a], "nonesuch belongs to no recipe: give models"),
        (lambda a: a[:4], "--b has no run, which does not show"),
        (
            lambda a: a[:6],
            "--b has one run, which does not show how much the recipe varies from seed to seed",
        ),
        (lambda a: [*a, "{here}/nonesuch"], "nonesuch is not there: give runs"),
        (lambda a: [*a, "{here}/file"], "file is a file: give runs"),
        (lambda a: [*a, "{here}"], "holds no results.json: evaluate the model first"),
        (
            lambda a: [*a, a[1]],
            r"a0 \[1\] and a0 \[6\] are the same model .* of both recipes: give each run once",
        ),
        (
            lambda a: [*a, a[5]],
            r"b0 \[4\] and b0 \[6\] are the same model .* of a recipe: give each run once",
        ),
        (lambda a: [*a, "{here}/seed"], "b1 and seed both have --seed 1, and do not show how much"),
        (
            lambda a: [*a, "{here}/dtype"],
            "dtype float32 for a0 and bfloat16 for dtype: evaluate all runs alike",
        ),
        (
            lambda a: [*a, "{here}/asked"],
            r"asked different questions in task \(0 of 40 and 40 are the same\)",
        ),
        (lambda a: [a[1]], "give at least two models to compare"),
        (lambda a: [*a, "--without-overlap"], "--without-overlap needs the prepared data"),
        (lambda a: [*a, "--without-overlap", "{here}/no"], "is not a prepared dataset"),
    ],
)
def test_wrong_runs_are_refused_in_one_sentence(tmp_path: Path, monkeypatch, change, message):
    arguments = recipes(tmp_path)
    right = right_of(arguments[1]).tolist()
    results(tmp_path, "seed", right, training=training(1))
    results(tmp_path, "dtype", right, training=training(8), dtype="bfloat16")
    (tmp_path / "file").touch()
    results(tmp_path, "asked", right, training=training(8), salt="x")
    with pytest.raises(UserError, match=message):
        compare(monkeypatch, *(str(argument).format(here=tmp_path) for argument in change(arguments)))


def test_equal_recipes_need_no_seeds_and_empty_results_are_named(tmp_path: Path, monkeypatch, capsys):
    a0, a1, b0, b1 = (results(tmp_path, name, [1, 0, 1, 1]) for name in ("a0", "a1", "b0", "b1"))
    compare(monkeypatch, "--a", a0, a1, "--b", b0, b1)
    assert cells(capsys.readouterr().out)[4:10] == ["0.00 ± 0.00", "0.00 to 0.00", "1.000", "2.0", "", ""]
    (a0 / "questions/task.jsonl").write_text("")
    with pytest.raises(
        UserError, match=r"task.jsonl cannot be read \(it has 0 of 4 questions\): remove it and"
    ):
        compare(monkeypatch, "--a", a0, a1, "--b", b0, b1)


def test_one_question_is_not_enough(tmp_path: Path, monkeypatch):
    with pytest.raises(UserError, match="one question does not show how much questions vary"):
        compare(monkeypatch, *recipes(tmp_path, n=1))
