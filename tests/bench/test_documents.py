"""`bench.documents`: groups by length, and the losses that the runs' own evaluations have."""

import re

import numpy as np
import pytest

from bench.documents import GROUPS, group_of_places
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
    out, _ = run_here(data, *(folder for folder, _ in runs), "--rows", "7", module="bench.documents")
    rows = re.findall(r"^. (\S+) +. (yes|no) .* (alone|after others) (.*)$", out, re.M)
    assert [row[:3] for row in rows] == [
        (str(folder), masked, how)
        for (folder, _), masked in zip(runs, ("yes", "no"), strict=True)
        for how in ("after others", "alone")
    ]
    for name, masked, how, losses in rows:
        if (masked == "yes") == (how == "alone"):
            logged = read_log(tmp_path / name, "eval")[-1]["nll"]
            assert abs(float(re.findall(r"[\d.]+", losses)[-1]) - logged) < 1e-4  # as printed


def test_no_run_is_refused():
    assert "give the folders of one run or more" in refusal_here("data", module="bench.documents")
