"""What the benchmarks that run commands of ours refuse themselves, before the first of these starts."""

from pathlib import Path

import pytest

from bench import eval, train_mirror
from tests.test_fixtures import FIXTURES
from tests.train_tpu.processes import refusal_here

RUN, EXPORT, DATA = FIXTURES / "mtlm1", FIXTURES / "mtlm1-export", FIXTURES / "data"


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (("nowhere", "--data-dir", FIXTURES), "nowhere is not there: give a run"),
        ((RUN, "--data-dir", FIXTURES), "mtlm1 is a checkpoint: give an exported folder"),
        ((EXPORT, "--run", EXPORT, "--data-dir", FIXTURES), "mtlm1-export has no checkpoint: give the run"),
        ((EXPORT, "--data-dir", "nowhere"), "--data-dir nowhere is not there"),
        ((EXPORT, "--data-dir", FIXTURES), "the data of wikitext is not there"),
        ((EXPORT, "--data-dir", FIXTURES, "--dtypes", "float16"), "give float32, bfloat16 or both"),
        ((EXPORT, "--data-dir", FIXTURES, "--dtypes"), "--dtypes needs at least one value: give some"),
    ],
)
def test_bench_eval(monkeypatch: pytest.MonkeyPatch, arguments: tuple, why: str):
    monkeypatch.setattr(eval, "in_process", lambda *_: pytest.fail("a row was started"))
    assert why in refusal_here(*arguments, module="bench.eval")


def test_a_row_that_fails_has_said_why(capfd: pytest.CaptureFixture):
    with pytest.raises(SystemExit) as end:
        eval.in_process(["nowhere", "--data-dir", str(FIXTURES)], "torch", "float32")
    assert end.value.code == 2
    assert capfd.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"--data": "nowhere"}, "nowhere is not a prepared dataset"),
        ({"--rows": "nowhere"}, "nowhere cannot be read"),
        ({"--preset": "mtlm3"}, "unknown preset 'mtlm3'"),
        ({"--out": FIXTURES}, "exists already: choose another folder"),
        ({}, "needs an NVIDIA GPU"),
    ],
)
def test_bench_train_mirror(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, changed: dict, why: str):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(train_mirror, "run", lambda *_: pytest.fail("a run was started"))
    rows, out = tmp_path / "rows.jsonl", tmp_path / "out"
    rows.write_text('{"prompt": "a", "response": "b"}\n')
    given = {"--data": DATA, "--rows": rows, "--out": out, **changed}
    assert why in refusal_here(
        *(word for pair in given.items() for word in pair), module="bench.train_mirror"
    )
    assert not out.exists()


def test_a_run_that_fails_has_said_why(capfd: pytest.CaptureFixture):
    with pytest.raises(SystemExit) as end:
        train_mirror.run("port_torch.train", "--preset", "mtlm3")
    assert end.value.code == 2
    assert capfd.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("option", ["--windows", "--context"])
def test_bench_loader(option: str):
    said = refusal_here("--data", DATA, option, "8", module="bench.loader")
    assert f"{option} is of random tokens, and {DATA} has its own" in said
