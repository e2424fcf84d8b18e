"""`bench.documents`: groups by length, and the losses that the runs' own evaluations have."""

import json

import numpy as np
import pytest

from bench.documents import ALONE, GROUPS, group_of_places, print_table
from core.run.log import read_log
from tests.train_tpu.processes import TINY, refusal_here, run_here, without


def test_a_place_belongs_to_the_length_of_its_document():
    lengths = (5, 1, 128, 129, 512, 513, 4)
    groups = group_of_places(np.repeat(np.arange(len(lengths)), lengths)[None])
    names = ["cut by a window", *["up to 128"] * 2, *["up to 512"] * 2, "over 512", "cut by a window"]
    np.testing.assert_array_equal(groups[0], np.repeat([GROUPS.index(name) for name in names], lengths))


@pytest.mark.slow
def test_each_run_has_its_own_loss(text, tmp_path):
    data = tmp_path / "data"
    run_here(text, "--out", data, "--tokenizer", "bytes", "--context", "32", module="train_tpu.prepare")
    runs = [(tmp_path / flag, f"--{flag}") for flag in ("document-mask", "no-document-mask")]
    arguments = (*without(TINY, "--steps"), "--steps", "2", "--prompts", "--data", data)
    for folder, flag in runs:
        run_here(*arguments, flag, "--out", folder)
    report = tmp_path / "reports" / "documents.json"
    folders = [folder for folder, _ in runs]
    out, _ = run_here(data, *folders, "--rows", "7", "--json", report, module="bench.documents")
    printed = [line.split("│")[1:-1] for line in out.splitlines() if line.startswith("│")]
    written = json.loads(report.read_text())
    assert written["tokens"]["all"] == sum(list(written["tokens"].values())[:-1])
    assert [(row["run"], row["masked"], row["documents"]) for row in written["rows"]] == [
        (str(folder), masked, how)
        for folder, masked in zip(folders, (True, False), strict=True)
        for how in ("after others", "alone")
    ]
    for row, cells in zip(written["rows"], printed, strict=False):
        assert cells[0].strip() == row["run"] and cells[-1].strip() == f"{row['nll']['all']:.4f}"
        if row["masked"] == (row["documents"] == ALONE):
            logged = read_log(tmp_path / row["run"], "eval")[-1]["nll"]
            # Means of a few hundred float32 losses of about 5.5, each within 1e-6, summed in another order.
            assert abs(row["nll"]["all"] - logged) < 1e-5


def test_a_table_in_a_pipe_has_all_figures(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    monkeypatch.setenv("COLUMNS", "80")
    losses = {name: 3.98765 + n for n, name in enumerate(GROUPS)} | {"over 512": None}
    run = "runs/no-document-mask-0"
    row = {"run": run, "masked": False, "documents": ALONE, "tokens_per_second": 1234567, "nll": losses}
    print_table({"split": "wikipedia-2018", "rows": [row], "tokens": dict.fromkeys(GROUPS, 1234567)})
    printed = capsys.readouterr().out.splitlines()
    of_run, of_tokens = (line.split("│")[1:-1] for line in printed if line.startswith("│"))
    figures = ["-" if loss is None else f"{loss:.4f}" for loss in losses.values()]
    assert [cell.strip() for cell in of_run] == [run, "no", ALONE, "1,234,567", *figures]
    assert [cell.strip() for cell in of_tokens] == ["tokens", "", "", "", *["1,234,567"] * len(GROUPS)]


def test_no_run_is_refused():
    assert "give the folders of one run or more" in refusal_here("data", module="bench.documents")


@pytest.mark.parametrize("what, said", [("", "is a folder"), ("file/x.json", "is a file")])
def test_a_report_that_cannot_be_written_is_refused_first(tmp_path, what: str, said: str):
    (tmp_path / "file").touch()
    refused = refusal_here("data", "run", "--json", tmp_path / what, module="bench.documents")
    assert said in refused
