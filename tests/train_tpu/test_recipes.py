"""The recipes as a user starts them, with a tiny model, a little text and evaluation sets of our own."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import transformers

from core.checkpoint.manifest import load_manifest
from core.checkpoint.steps import find_step
from core.data.dataset import open_dataset
from tests.eval.small_sets import WORDS, write_sets

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "train_tpu" / "recipes"
BATCH, CONTEXT = 4, 64
BOTH = pytest.mark.parametrize("recipe", ["mtlm1", "mtlm2"])


def write_text(path: Path, n_documents: int, seed: int = 0) -> str:
    rng = np.random.default_rng(seed)
    texts = (" ".join(rng.choice(WORDS, 150)) + "." for _ in range(n_documents))
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


def start(recipe: str, folder: Path, **settings: str | int) -> subprocess.Popen:
    """A recipe begun in `folder`, as the leader of a process group of its own."""
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        **{name: str(value) for name, value in settings.items()},
    }
    return subprocess.Popen(
        ["bash", str(RECIPES / f"{recipe}.sh"), "--prompts", "The rain"],
        cwd=folder, env=environment, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def run(recipe: str, folder: Path, **settings: str | int) -> str:
    process = start(recipe, folder, **settings)
    out, errors = process.communicate(timeout=1200)
    assert process.returncode == 0, f"{out}\n{errors}"
    return out


def lasting(out: Path) -> dict[str, int]:
    """When each file was written that a further start has no reason to write."""
    kept = [*out.glob("*/checkpoints"), out / "data", out / "exported"]
    files = [f for folder in kept for f in folder.rglob("*") if f.is_file()] + list(
        out.glob("*/metrics.jsonl")
    )
    assert len(files) > 20
    return {str(f.relative_to(out)): f.stat().st_mtime_ns for f in files}


def trained(run_folder: Path) -> list[int]:
    """The numbers of the updates that a run has logged, in order."""
    rows = map(json.loads, (run_folder / "metrics.jsonl").read_text().splitlines())
    return [row["step"] for row in rows if row["kind"] == "train"]


@pytest.mark.slow
def test_mtlm2_interrupted_and_finished(tmp_path):
    tokens = 30_000
    steps = tokens // (BATCH * CONTEXT)
    write_sets(tmp_path / "sets", n=4)
    settings = {
        "TOKENS": tokens, "BATCH": BATCH, "CONTEXT": CONTEXT, "MODEL": "mtlm2-tiny", "RUN_DIR": "out",
        "TASKS": "arc_easy,wikitext", "EVAL_DATA": "sets", "DATA": write_text(tmp_path / "text.jsonl", 2000),
        "HELDOUT": f"a={write_text(tmp_path / 'a.jsonl', 3, 1)};b={write_text(tmp_path / 'b.jsonl', 2, 2)}",
    }  # fmt: skip
    out = tmp_path / "out"

    process = start("mtlm2", tmp_path, **settings)
    log = out / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 300
    while not log.exists() or log.read_text().count('"train"') < 5:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)  # Ctrl-C
    process.communicate(timeout=120)
    assert process.returncode == 3  # that of train_tpu.run: interrupted, saved
    there = load_manifest(find_step(out / "run")).step
    assert 0 < there < steps and not (out / "exported").exists()
    prepared = (out / "data" / "dataset.json").stat().st_mtime_ns

    printed = run("mtlm2", tmp_path, **settings)
    assert f"resuming out/run at step {there}" in printed
    assert (out / "data" / "dataset.json").stat().st_mtime_ns == prepared
    data, manifest = open_dataset(out / "data"), load_manifest(find_step(out / "run"))
    assert data.splits["train"].tokens >= tokens > data.splits["train"].tokens - 500
    assert data.heldout == ["a", "b"] and data.splits["a"].documents == 3
    assert manifest.tokens == steps * BATCH * CONTEXT and tokens - BATCH * CONTEXT < manifest.tokens <= tokens
    assert trained(out / "run") == list(range(steps))
    results = json.loads((out / "run" / "eval" / f"step-{steps}" / "results.json").read_text())
    assert set(results["evaluations"]) == {"arc_easy", "wikitext"}
    model = transformers.AutoModelForCausalLM.from_pretrained(out / "exported", trust_remote_code=True)
    assert model.config.num_hidden_layers == 6
    assert printed.rstrip().rpartition("In the early years of")[2]  # a text that goes on

    before = lasting(out)
    printed = run("mtlm2", tmp_path, **settings)
    assert f"out/run has finished ({steps} of {steps} steps)" in printed
    assert "arc_easy: already evaluated" in printed
    assert lasting(out) == before


@pytest.mark.slow
def test_mtlm1_in_three_phases(tmp_path):
    tokens = 12_000
    steps = tokens // (BATCH * CONTEXT)
    settings = {
        "TOKENS": tokens, "BATCH": BATCH, "CONTEXT": CONTEXT, "BASE": "mtlm1-tiny", "RUN_DIR": "out",
        "TASKS": "",
        "DATA": f"{write_text(tmp_path / 'text.jsonl', 20)};{tmp_path}/more text/*.jsonl",
    }  # fmt: skip
    (tmp_path / "more text").mkdir()
    write_text(tmp_path / "more text" / "text.jsonl", 400, seed=1)
    out = tmp_path / "out"
    run("mtlm1", tmp_path, **settings)
    assert open_dataset(out / "data").heldout == ["valid"]
    base, grown = (load_manifest(find_step(out / name)) for name in ("base", "grown"))
    assert (base.step, grown.step) == (steps // 2, steps)
    assert grown.tokens == steps * BATCH * CONTEXT
    assert [m.config["model"]["n_layers"] for m in (base, grown)] == [6, 12]
    assert grown.lineage[-1]["operation"] == "grow" and grown.lineage[-1]["tokens"] == base.tokens
    assert trained(out / "grown") == list(range(steps))  # those of the shallow model first
    model = transformers.LlamaForCausalLM.from_pretrained(out / "exported")
    assert len(model.model.layers) == 12

    before = lasting(out)
    assert f"out/grown has finished ({steps} of {steps} steps)" in run("mtlm1", tmp_path, **settings)
    assert lasting(out) == before
    # What would make it another run is refused by the run itself.
    process = start("mtlm1", tmp_path, **settings | {"BATCH": 2})
    assert "has --batch 4, not 2" in process.communicate(timeout=300)[1]
    assert process.returncode == 2


@BOTH
def test_paths_with_spaces_reach_the_commands_whole(tmp_path, recipe):
    """A python that only notes its arguments and fails, so that the recipe ends after preparing."""
    (tmp_path / "bin").mkdir()
    python = tmp_path / "bin" / "python"
    python.write_text('#!/bin/sh\n[ "$1" = -c ] && exit 0\nprintf "%s\\n" "$@" >arguments\nexit 2\n')
    python.chmod(0o755)
    text = {"DATA": "my texts/*.jsonl;b.txt", "HELDOUT": "a=my a.txt;b=c.txt"}
    settings = {"PATH": f"{python.parent}:/usr/bin:/bin", "RUN_DIR": "my run", **text}
    process = start(recipe, tmp_path, **settings)
    process.communicate(timeout=120)
    assert process.returncode == 2
    given = (tmp_path / "arguments").read_text().splitlines()
    assert given[1:6] == ["train_tpu.prepare", "my texts/*.jsonl", "b.txt", "--out", "my run/data"]
    assert given[-2:] == ["--valid=a=my a.txt", "--valid=b=c.txt"]


@BOTH
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"TOKENS": "14B"}, "TOKENS is '14B': give a whole number"),
        ({"BATCH": 0}, "BATCH is '0': give a whole number"),
        ({"TOKENS": 100}, "TOKENS is 100, fewer than"),
        ({"PATH": "{tmp}/bin:/usr/bin:/bin"}, "packages are missing, of train_tpu "),
        ({"RUN_DIR": "{tmp}/old", "TOKENS": 10_000_000}, "was not prepared for 10000000 tokens"),
        ({"DATA": "missing.jsonl"}, "no file, folder or glob 'missing.jsonl'"),
        pytest.param(
            {"HELDOUT": "text.jsonl", "DATA": "builtin"},
            "--valid text.jsonl has no path: write NAME=PATH",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_wrong_use_is_one_sentence_and_trains_nothing(tmp_path, recipe, settings, message):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "bin" / "python").chmod(0o755)
    (tmp_path / "old" / "data").mkdir(parents=True)
    (tmp_path / "old" / "data" / "dataset.json").write_text('{\n "train_tokens": 9000000,\n "files": {}\n}\n')
    given = {name: str(value).format(tmp=tmp_path) for name, value in settings.items()}
    process = start(recipe, tmp_path, **{"RUN_DIR": "out"} | given)
    out, errors = process.communicate(timeout=120)
    assert process.returncode == 2
    # Before what only the first command can notice, it says what it is going to do.
    assert out == "" or (" tokens of " in out and out.count("\n") == 1), out
    assert errors.startswith("error: ") and errors.count("\n") == 1 and message in errors
    assert not (tmp_path / "out").exists()
