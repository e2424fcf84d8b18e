"""`python -m stacking.grow` on real runs: what it writes, that training goes on to the bit, refusals."""

import contextlib
import dataclasses
import io
import json
import shlex
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest

import stacking.rewrite
from core import cli
from core.cache import CACHE
from core.checkpoint.checkpointer import flatten, restore, save_params
from core.checkpoint.manifest import load_manifest, seal
from core.checkpoint.steps import find_step, step_path
from core.config import ModelConfig
from core.data.batches import train_batches
from core.data.dataset import open_dataset
from core.errors import UserError
from core.keys import Purpose, make_key
from core.model import init_params
from core.run.log import read_log
from core.run.schedule import learning_rate
from core.run.settings import model_config, unflatten
from core.sharding import make_mesh
from stacking import grow as command
from stacking.growth import source_model, with_model
from stacking.plan import make_plan
from stacking.transform import grow
from tests.stacking import oracle
from tests.train_tpu.processes import ROOT, TINY, losses, run_here
from train_tpu.backend import choose_step
from train_tpu.config import RunConfig, defaults
from train_tpu.engine import place_batch
from train_tpu.step import Controls, abstract_state, compile_step

GROWN_AT = 6


@pytest.fixture(scope="module")
def base(cache, text):
    """A run of 12 steps, its trunk kept at step 6."""
    folder = cache / "grow-base"
    kept = ("--keep-steps", str(GROWN_AT), "--n-layers", "3", "--sample-every", "0")
    run_here(*TINY, "--data", text, "--out", folder, *kept)
    return folder


@pytest.fixture(scope="module")
def trunk(base):
    return step_path(base / "checkpoints", GROWN_AT)


@pytest.fixture(scope="module")
def untrained(cache, trunk):
    """The trunk, grown as the command grows by default, and what the command said."""
    folder, out = cache / "grow-untrained", io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out):
        patch.setattr(stacking.rewrite, "code_version", lambda: {"commit": "that grew it"})
        patch.setattr(sys, "argv", ["grow", str(trunk), "--out", str(folder)])
        assert command.main() == 0
    return folder, out.getvalue()


@pytest.fixture(scope="module")
def stacked(cache, untrained):
    """The grown run, trained to its end, and what that said."""
    folder = shutil.copytree(untrained[0], cache / "grow-stacked")
    trained, _ = run_here("--out", folder, drawn=True)
    return folder, trained


@pytest.fixture
def grow_here(monkeypatch):
    """Runs the command in this process: quicker, and its parts can be replaced."""

    def call(*arguments) -> int:
        monkeypatch.setattr(sys, "argv", ["grow", *map(str, arguments)])
        return command.main()

    return call


def open_state(folder):
    """The state, manifest and step settings of a checkpoint."""
    step_dir = find_step(folder)
    manifest = load_manifest(step_dir)
    settings_of = unflatten(manifest.config["run"], RunConfig)
    model = ModelConfig(**manifest.config["model"])
    step, _ = choose_step(settings_of, model, make_mesh(devices=jax.devices()[:1]))
    return restore(step_dir, abstract_state(step, step.compute.mesh)), manifest, settings_of, step


def train_here(state, manifest, run_config, step_config, end=None) -> list[tuple[int, float, float]]:
    """The rest of a run, or that until `end`, by the compiled step alone: (step, loss, gradient norm)."""
    prepared = map(open_dataset, CACHE.glob("text-jsonl-*"))  # other tests have theirs there, too
    data = next(found for found in prepared if found.fingerprint == manifest.data["fingerprint"])
    mesh = step_config.compute.mesh
    compiled = compile_step(step_config, run_config.batch, 1, mesh)
    batches = train_batches(
        data, seed=run_config.seed, batch=run_config.batch, start=manifest.sequences, vocab_size=258
    )
    rows = []
    for step in range(manifest.step, end or run_config.steps):
        rate = learning_rate(run_config.optim, step, run_config.steps)
        controls = Controls(np.float32(rate), np.float32(run_config.guard.sigma), np.int32(10), np.uint32(0))
        state, metrics = compiled(state, place_batch(next(batches), run_config.batch, 1, mesh), controls)
        rows.append((step, float(metrics.loss), float(metrics.grad_norm)))
    batches.close()
    return rows


def test_the_rates_of_the_table_are_those_that_the_run_was_steered_to(trunk, grow_here, tmp_path, capsys):
    """What was steered holds for the grown run, too."""
    step_dir = shutil.copytree(trunk, tmp_path / "run" / "checkpoints" / trunk.name)
    steering = [{"step": 3, "command": "lr=0.5x"}]
    manifest = dataclasses.replace(load_manifest(step_dir), steering=steering)
    (step_dir / "manifest.json").write_text(manifest.to_json())
    assert grow_here(step_dir, "--dry-run") == 0
    (row,) = (line.split() for line in capsys.readouterr().out.splitlines() if "learning rate here" in line)
    assert row[-2:] == ["0.005", "0.005"]


@pytest.mark.slow
def test_grow_save_restore_train_equals_grow_train(stacked, untrained, trunk):
    """The run that went through files and commands, against the same in memory, to the bit."""
    folder, trained = stacked
    assert "grown here from 3 to 6 layers (stack)" in trained
    state, manifest, _, _ = open_state(trunk)
    _, _, grown_run, grown_step = open_state(untrained[0])
    expected = train_here(grow(state, make_plan("stack", 3)), manifest, grown_run, grown_step)
    own = [row for row in losses(folder) if row[0] >= GROWN_AT]
    assert own == expected and len(own) == 6
    # What the growth recorded stays with what is trained from there.
    assert load_manifest(find_step(folder)).lineage == load_manifest(find_step(untrained[0])).lineage


SIZES = {"V": 258, "C": 32, "D": 32, "F": 64}  # of TINY's model


def leaves_of(run_folder) -> oracle.Leaves:
    return oracle.read(find_step(run_folder))


def test_every_array_on_the_disk_is_the_oracles(untrained, trunk):
    old, new = oracle.read(trunk), leaves_of(untrained[0])
    assert {path: leaf.shape for path, leaf in old.items()} == oracle.shapes("mtlm1", "adamw", 3, 4, SIZES)
    oracle.assert_equal(new, oracle.grown("mtlm1", "adamw", old, "0 1 2 0 1 2", "cccccc"))


def test_the_command_says_what_it_did_and_records_it(untrained, trunk):
    folder, out = untrained
    # d 32, MLP 64, 258 ids: 4 d^2 + 3 d 64 + 2 d a layer, d behind the last, a tied table.
    for n_layers in (3, 6):
        assert f"{n_layers * (4 * 32**2 + 3 * 32 * 64 + 2 * 32) + 32 + 258 * 32:,}" in out
    n_leaves = len(load_manifest(trunk).tree)
    for words in ("3 -> 6 layers (0-2,0-2)", f"verified: {n_leaves} leaves", "loss on the probe batch"):
        assert words in out, words
    assert f"next: python -m train_tpu.run --out {folder}" in out
    manifest = load_manifest(find_step(folder))
    (entry,) = manifest.lineage
    source = load_manifest(trunk)
    assert (entry["operation"], entry["plan"], entry["layers"]) == ("grow", "stack", [3, 6])
    assert entry["sources"] == [0, 1, 2, 0, 1, 2] and entry["how"] == ["copy"] * 6
    assert entry["source_files"] == {name: file["sha256"] for name, file in source.files.items()}
    assert [model["n_layers"] for model in entry["model"]] == [3, 6]
    small = ModelConfig(**entry["model"][0])
    assert entry["flops"] == GROWN_AT * 4 * 32 * small.flops_per_token()
    assert all(np.isfinite(entry["probe"]["loss"])) and entry["probe"]["tokens"] == small.context
    for counter in ("step", "sequences", "tokens"):
        assert getattr(manifest, counter) == getattr(source, counter)
    assert manifest.data == source.data and manifest.code == {"commit": "that grew it"}


@pytest.mark.slow
def test_the_log_tells_the_whole_history(stacked, base):
    folder, _ = stacked
    assert [row["step"] for row in read_log(folder, "train")] == list(range(12))
    assert losses(folder)[:GROWN_AT] == losses(base)[:GROWN_AT]
    # The held-out loss just before and just after, at the same step.
    at = [row for row in read_log(folder, "eval") if row["step"] in (5, GROWN_AT)]
    assert ["before_growth" in row for row in at] == [True, False]
    tokens = [row["tokens"] for row in read_log(folder, "train")]
    assert tokens == [step * 4 * 32 for step in range(12)]  # no sequence twice, none left out
    out = (folder / "loss_curve.png").read_bytes()
    assert out.startswith(b"\x89PNG")


@pytest.mark.slow
def test_identity_growth_continues_with_the_loss_of_the_ungrown_run(cache, base, trunk, grow_here, tmp_path):
    out = tmp_path / "identity"
    (tmp_path / ".identity.partial/checkpoints").mkdir(parents=True)  # left by a growth that was killed
    assert grow_here(trunk, "--op", "identity", "--schedule", "keep", "--out", out) == 0
    expected = oracle.grown("mtlm1", "adamw", oracle.read(trunk), "0 1 2 0 1 2", "ccciii")
    oracle.assert_equal(leaves_of(out), expected)
    assert [path.name for path in tmp_path.iterdir()] == ["identity"]
    before, after = load_manifest(find_step(out)).lineage[-1]["probe"]["loss"]
    assert before == after
    # The next batch, with its dropout masks, through the same function. Compiled with the layers unrolled,
    # six instead of three may be fused otherwise, so the last bit of a float32 sum is free.
    ((_, loss, _),) = train_here(*open_state(out), end=GROWN_AT + 1)
    np.testing.assert_allclose(loss, losses(base)[GROWN_AT][1], rtol=3e-7)


@pytest.mark.slow
def test_growing_again_and_by_any_plan(grow_here, trunk, tmp_path, cache):
    first, second = tmp_path / "first", tmp_path / "second"
    assert grow_here(trunk, "--layers", "0-2,1:identity,2,0:fresh", "--out", first, "--steps", "30") == 0
    drawn = init_params(source_model(first, load_manifest(find_step(first))), make_key(0, Purpose.GROW, 6))
    drawn = {f"params/{path}": np.asarray(leaf) for path, leaf in flatten(drawn)[0].items()}
    old, new = oracle.read(trunk), leaves_of(first)
    oracle.assert_equal(new, oracle.grown("mtlm1", "adamw", old, "0 1 2 1 2 0", "cccicf", drawn=drawn))
    again = ("--op", "interleave", "--optimizer", "reset", "--schedule", "restart", "--steps", "30")
    assert grow_here(first, *again, "--out", second) == 0
    sources = "0 0 1 1 2 2 3 3 4 4 5 5"
    oracle.assert_equal(leaves_of(second), oracle.grown("mtlm1", "adamw", new, sources, 12 * "c", reset=True))
    manifest = load_manifest(find_step(second))
    assert [entry["layers"] for entry in manifest.lineage] == [[3, 6], [6, 12]]
    assert manifest.lineage[1]["flops"] == manifest.lineage[0]["flops"]  # nothing was trained in between
    out, _ = run_here("--out", second, "--stop-at", "8")
    assert "12 layers" in out


def test_a_preset_is_named_where_the_grown_model_is_one():
    run_config = defaults("mtlm1-88m")
    model = model_config(run_config, 32_000)
    deeper = with_model(run_config, dataclasses.replace(model, n_layers=24))
    assert (deeper.preset, deeper.model.n_layers) == ("mtlm1-200m", None)
    assert model_config(deeper, 32_000).n_params == 201_560_832
    given = dataclasses.replace(run_config, model=dataclasses.replace(run_config.model, n_layers=12))
    assert with_model(given, dataclasses.replace(model, n_layers=24)) == deeper
    other = with_model(run_config, dataclasses.replace(model, n_layers=18))
    assert (other.preset, other.model.n_layers) == ("mtlm1-88m", 18)


@pytest.fixture(scope="module")
def imported(cache, trunk):
    """The trunk's parameters alone, as an import writes them."""
    state, manifest, _, _ = open_state(trunk)
    manifest = dataclasses.replace(manifest, kind="params", tree={}, files={}, data=None)
    return save_params(cache / "grow-imported", state.params, manifest)


def test_what_to_type_behind_grown_parameters(grow_here, imported, tmp_path, capsys):
    """Everything that a new run must be told of them: it parses to just their model and tokenizer."""
    out = tmp_path / "with a space"
    assert grow_here(imported, "--out", out) == 0
    printed = capsys.readouterr().out
    words = shlex.split(printed.rpartition("next: ")[2])
    assert words[:3] == ["python", "-m", "train_tpu.run"] and words[-2:] == ["--data", "DATA"]
    run_config = cli.parse(RunConfig, words[3:], prog="run")
    assert run_config.init_from == out and run_config.tokenizer == "bytes"
    made, grown = model_config(run_config, 258), source_model(out, load_manifest(out))
    assert made.function() == grown.function() and grown.n_layers == 6
    assert load_manifest(out).lineage[-1]["probe"]["tokens"] == grown.context


@pytest.mark.slow
def test_parameters_alone_grow_and_train(cache, text, imported, grow_here, tmp_path):
    out = tmp_path / "grown"
    assert grow_here(imported, "--op", "identity", "--out", out) == 0
    assert load_manifest(out).kind == "params"
    more = ("--n-layers", "6", "--init-from", out, "--stop-at", "1", "--out", tmp_path / "run")
    run_here(*TINY, "--data", text, *more)
    assert load_manifest(find_step(tmp_path / "run")).lineage[0]["operation"] == "grow"


def test_a_checkpoint_is_found_from_within_its_run(grow_here, base, monkeypatch, capsys):
    """Its run has a name there, too: the default --out is made of it."""
    for folder, path in ((base, "."), (base / "checkpoints", find_step(base).name)):
        monkeypatch.chdir(folder)
        assert grow_here(path, "--schedule", "restart", "--steps", "24", "--dry-run") == 0
        assert f"{base.name}-grown" in capsys.readouterr().out


def test_a_dry_run_writes_nothing(grow_here, base, trunk, tmp_path, capsys):
    before = sorted(base.rglob("*"))
    assert grow_here(trunk, "--dry-run", "--out", tmp_path / "new") == 0
    said = capsys.readouterr().out
    assert said.endswith("was not written\n") and "would be refused" not in said
    assert grow_here(trunk, "--dry-run", "--out", base) == 0
    assert f"would be refused now: {base} exists already: " in capsys.readouterr().out
    assert sorted(base.rglob("*")) == before and not list(tmp_path.iterdir())


def test_an_identity_growth_that_changes_the_loss_is_noticed_and_removed(
    grow_here, trunk, tmp_path, monkeypatch
):
    real = stacking.rewrite.grow_leaf

    def bad(names, leaf, plan, **rest):
        grown = real(names, leaf, plan, **rest)
        return grown.at[0].add(1e-3) if names == ("params", "norm", "scale") else grown

    monkeypatch.setattr(stacking.rewrite, "grow_leaf", bad)
    with pytest.raises(RuntimeError, match="identity growth changed the loss"):
        grow_here(trunk, "--op", "identity", "--out", tmp_path / "new")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("sealed", [False, True])
def test_a_byte_that_the_disk_changes_is_noticed(grow_here, trunk, tmp_path, monkeypatch, sealed):
    """Between writing and checking, before the files were hashed or after."""
    real = stacking.rewrite.save_tree

    def damaging(target, *rest):
        real(target, *rest)
        chunk = next((target / "state/params.layers.mlp.up.kernel").glob("0*"))
        content = bytearray(chunk.read_bytes())
        content[100] ^= 1
        chunk.write_bytes(content)
        if not sealed:
            seal(target, load_manifest(target))

    monkeypatch.setattr(stacking.rewrite, "save_tree", damaging)
    message = (
        r"up\.kernel.* does not match its sha256"
        if sealed
        else "up/kernel in .* is not what was written there"
    )
    with pytest.raises(UserError, match=message):
        grow_here(trunk, "--out", tmp_path / "new")
    assert not list(tmp_path.iterdir())


def rewrite_manifest(step_dir, **changes):
    manifest = dataclasses.replace(load_manifest(step_dir), **changes)
    (step_dir / "manifest.json").write_text(manifest.to_json())


def damaged_manifest(step_dir):
    path = step_dir / "manifest.json"
    path.write_text(path.read_text().replace('"step": 6', '"step": 7'))


def other_format(step_dir):
    fields = json.loads((step_dir / "manifest.json").read_text())
    (step_dir / "manifest.json").write_text(json.dumps(fields | {"format_version": 9}))


def untied(step_dir):
    config = load_manifest(step_dir).config
    rewrite_manifest(step_dir, config=config | {"model": config["model"] | {"tied": False}})


def missing_leaf(step_dir):
    tree = load_manifest(step_dir).tree
    rewrite_manifest(step_dir, tree={k: v for k, v in tree.items() if "mlp_norm" not in k})


def lost_file(step_dir):
    shutil.rmtree(step_dir / "state/params.norm.scale")


def no_model(step_dir):
    rewrite_manifest(step_dir, config={"run": {}})


@pytest.mark.parametrize(
    "damage, message",
    [
        (damaged_manifest, "does not match its own sha256"),
        (other_format, "has format version 9, and this version of mtlm reads 1"),
        (untied, "not what its configuration says: params/head/kernel is missing in it"),
        (missing_leaf, "not what its configuration says: .*mlp_norm/scale is missing in it"),
        (lost_file, "params.norm.scale.* is missing"),
        (no_model, "does not say which model it holds"),
    ],
)
def test_damaged_and_contradictory_checkpoints_are_refused(grow_here, trunk, tmp_path, damage, message):
    copy = tmp_path / "run/checkpoints" / trunk.name
    shutil.copytree(trunk, copy)
    damage(copy)
    with pytest.raises(UserError, match=message):
        grow_here(copy, "--out", tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--factor", "1.5"), "factor of 1.5 does not fit 3 layers"),
        (("--layers", "0-3"), "names layer 3, but the model has 3 layers, 0 to 2"),
        (("--layers", "0-2", "--factor", "2"), "leave --factor out"),
        (("--optimizer", "reset", "--schedule", "keep"), "full-size updates"),
        (("--schedule", "rewarm:7"), "only 6 steps are left"),
        (("--schedule", "sometimes"), "is not known"),
        (("--steps", "6"), "has ended"),
    ],
)
def test_what_does_not_fit_is_refused(grow_here, trunk, tmp_path, arguments, message):
    with pytest.raises(UserError, match=message):
        grow_here(trunk, "--out", tmp_path / "new", *arguments)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "source, out, message",
    [
        pytest.param("base", "new", "has ended", marks=pytest.mark.slow),
        pytest.param("trunk", "there", "exists already", marks=pytest.mark.slow),
        ("nowhere", "new", "does not exist"),
    ],
)
def test_refusals_are_one_sentence_before_jax_is_imported(base, trunk, tmp_path, source, out, message):
    (tmp_path / "there").mkdir()
    source = {"base": base, "trunk": trunk, "nowhere": tmp_path / "nowhere"}[source]
    script = (
        "import sys\n"
        "from core.errors import run_command\n"
        "from stacking.grow import main\n"
        "try:\n"
        "    run_command(main)\n"
        "finally:\n"
        "    print('jax' in sys.modules)\n"
    )
    command = [sys.executable, "-c", script, str(source), "--out", str(tmp_path / out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "False\n"), done.stderr
    assert message in done.stderr and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["there"]
