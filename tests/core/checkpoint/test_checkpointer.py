"""Checkpoints: what is saved comes back bit for bit, and what is damaged is never opened."""

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import core.checkpoint.checkpointer
from core.checkpoint.checkpointer import Checkpointer, restore, restore_params, save_params
from core.checkpoint.manifest import (
    EXPORT_MANIFEST,
    MANIFEST,
    Manifest,
    code_version,
    digest,
    load_manifest,
    seal,
    verify,
)
from core.checkpoint.manifest import _git_commit as git_commit
from core.checkpoint.steps import (
    Keep,
    find_start,
    find_step,
    leave_newer,
    list_steps,
    newest_intact,
    run_folder,
    set_aside,
    step_path,
)
from core.errors import UserError

ROOT = Path(__file__).parents[3]


class Guard(NamedTuple):
    window: jax.Array
    skipped: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class TrainState:
    params: Any
    opt: Any
    guard: Guard
    seed: jax.Array


OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))


def make_state(step: int) -> TrainState:
    """Every dtype and container that a training state has; no two leaves or steps alike."""
    rng = np.random.default_rng(step)
    params = {
        "embed": jnp.asarray(rng.normal(size=(64, 32)), jnp.float32),
        "layers": {"q": jnp.asarray(rng.normal(size=(3, 32, 32)), jnp.bfloat16)},
    }
    opt = OPTIMIZER.init(params)
    opt = jax.tree.map(lambda x: jnp.asarray(100 * rng.normal(size=x.shape), x.dtype), opt)
    guard = Guard(jnp.asarray(rng.normal(size=16), jnp.float32), jnp.asarray(step, jnp.int32))
    return TrainState(params, opt, guard, jnp.asarray(2**32 - 1 - step, jnp.uint32))


def abstract(tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def make_manifest(step: int, kind: str = "train") -> Manifest:
    return Manifest(
        kind=kind,
        step=step,
        sequences=8 * step,
        tokens=64 * step,
        config={"model": {"d_model": 32}, "run": {"name": "é", "rate": 3e-4}},
        tokenizer={"name": "bytes", "sha256": "0" * 64},
        data={"fingerprint": "f", "cursor": 8 * step},
        lineage=[{"operation": "grow", "from": "elsewhere"}],
    )


def assert_same_bits(actual: Any, expected: Any) -> None:
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for x, y in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert x.dtype == y.dtype and x.shape == y.shape
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def save_steps(folder: Path, *steps: int, keep: Keep = Keep()) -> None:  # noqa: B008 (frozen)
    with Checkpointer(folder, keep) as checkpointer:
        for step in steps:
            checkpointer.save(step, make_state(step), make_manifest(step))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Step 5 of a run, not to be changed."""
    folder = tmp_path_factory.mktemp("run") / "checkpoints"
    save_steps(folder, 5)
    return folder / "00000005"


@pytest.fixture
def step_dir(saved: Path, tmp_path: Path) -> Path:
    """A copy of it, to be damaged."""
    return Path(shutil.copytree(saved, tmp_path / "checkpoints" / saved.name))


def files_of(step_dir: Path) -> list[str]:
    return sorted(str(p.relative_to(step_dir)) for p in step_dir.rglob("*") if p.is_file())


def flip_bit(path: Path, position: int, bit: int = 0) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1 << bit
    path.write_bytes(content)


# What is saved comes back


def test_state_comes_back_bit_for_bit_in_its_own_types(saved: Path) -> None:
    state = make_state(5)
    restored = restore(saved, abstract(state))
    assert_same_bits(restored, state)
    assert type(restored.opt[1][0]) is type(state.opt[1][0])  # optax's NamedTuple, not a dict


def test_parameters_come_back_alone_from_either_kind(saved: Path, tmp_path: Path) -> None:
    params = make_state(5).params
    assert_same_bits(restore_params(saved, abstract(params)), params)
    folder = save_params(tmp_path / "imported", params, make_manifest(0, "params"))
    assert find_step(folder) == folder
    assert_same_bits(restore_params(folder, abstract(params)), params)
    with pytest.raises(UserError, match="--init-from"):
        restore(folder, abstract(make_state(5)))
    with pytest.raises(UserError, match="exists already"):
        save_params(folder, params, make_manifest(0, "params"))


def test_parameters_are_read_without_the_optimizer(step_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in (step_dir / "state").glob("opt.*"):
        shutil.rmtree(path)
    monkeypatch.setattr(core.checkpoint.checkpointer, "verify", lambda _: None)
    params = make_state(5).params
    assert_same_bits(restore_params(step_dir, abstract(params)), params)


def test_arrays_may_be_donated_as_soon_as_save_returns(tmp_path: Path) -> None:
    update = jax.jit(lambda x: x + 1, donate_argnums=0)
    x = jnp.zeros((2000, 1000))
    with Checkpointer(tmp_path, Keep()) as checkpointer:
        checkpointer.save(1, {"params": x}, make_manifest(1))
        for _ in range(5):
            x = update(x)
        jax.block_until_ready(x)
    saved = restore(find_step(tmp_path), {"params": abstract(x)})["params"]
    assert not np.asarray(saved).any()


def test_save_goes_on_in_the_background(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    may_seal, seal = threading.Event(), core.checkpoint.checkpointer.seal
    monkeypatch.setattr(core.checkpoint.checkpointer, "seal", lambda *args: (may_seal.wait(60), seal(*args)))
    manifest = make_manifest(1)
    with Checkpointer(tmp_path, Keep()) as checkpointer:
        checkpointer.save(1, make_state(1), manifest)
        assert checkpointer.latest_committed is None
        assert [p.name for p in tmp_path.iterdir()] == [".00000001.partial"]
        manifest.config["model"]["d_model"] = 99  # after the call: not what was saved
        may_seal.set()
        checkpointer.wait()
        assert checkpointer.latest_committed == 1
    assert load_manifest(find_step(tmp_path)).config["model"]["d_model"] == 32


# The manifest


def test_a_run_that_saves_nothing_does_not_wait_for_orbax(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "orbax.checkpoint", None)  # importing it is an ImportError
    with Checkpointer(tmp_path, Keep()) as checkpointer:
        checkpointer.wait()


def test_manifest_says_what_is_there(saved: Path) -> None:
    manifest, state = load_manifest(saved), make_state(5)
    assert (manifest.kind, manifest.step, manifest.sequences, manifest.tokens) == ("train", 5, 40, 320)
    assert manifest.config == make_manifest(5).config
    assert manifest.data == {"fingerprint": "f", "cursor": 40}
    assert len(manifest.tree) == len(jax.tree.leaves(state))
    assert manifest.tree["params/layers/q"] == {"shape": [3, 32, 32], "dtype": "bfloat16"}
    assert manifest.tree["opt/1/0/mu/embed"] == {"shape": [64, 32], "dtype": "float32"}
    assert manifest.tree["guard/skipped"] == {"shape": [], "dtype": "int32"}
    assert sorted([*manifest.files, "manifest.json"]) == files_of(saved)
    assert manifest.code["jax"] == jax.__version__
    assert Manifest.from_json(manifest.to_json()) == manifest


def test_sha256_is_that_of_other_tools(saved: Path) -> None:
    files = load_manifest(saved).files
    lines = "".join(f"{record['sha256']}  {name}\n" for name, record in files.items())
    subprocess.run(["sha256sum", "--check", "--quiet"], input=lines, text=True, cwd=saved, check=True)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"format_version": 2}, "format version 2.*reads 1"),
        ({"tokens": None}, "lacks field tokens"),
        ({"mood": "good"}, "unknown field mood"),
        ({"step": 6}, "damaged or edited"),
    ],
)
def test_manifest_of_another_kind_is_refused(step_dir: Path, change: dict, message: str) -> None:
    path = step_dir / "manifest.json"
    fields = {**json.loads(path.read_text()), **change}
    path.write_text(json.dumps({name: value for name, value in fields.items() if value is not None}))
    with pytest.raises(UserError, match=f"manifest.json.*{message}"):
        load_manifest(step_dir)


def test_manifest_leads_nowhere_outside(step_dir: Path) -> None:
    manifest = load_manifest(step_dir)
    (step_dir.parent / "secret").write_text("x")
    files = {**manifest.files, "../secret": {"size": 1, "sha256": "0" * 64}}
    (step_dir / "manifest.json").write_text(dataclasses.replace(manifest, files=files).to_json())
    with pytest.raises(UserError, match=r"\.\./secret is missing"):
        verify(step_dir)


# Damage is refused, by the name of the file


def test_flipped_bits_of_the_manifest_are_refused(step_dir: Path) -> None:
    path = step_dir / "manifest.json"
    content = path.read_bytes()
    for position in range(0, len(content), 5):
        flip_bit(path, position, bit=position % 8)
        with pytest.raises(UserError, match=r"manifest\.json"):
            load_manifest(step_dir)
        path.write_bytes(content)


def damages(content: bytes) -> dict[str, bytes | None]:
    """What may become of a file's content; None: no file."""
    size = len(content)
    flipped = {}
    for at in (0, size // 3, size // 2, size - 1):
        flipped[f"bit {at % 8} of byte {at}"] = (
            content[:at] + bytes([content[at] ^ 1 << at % 8]) + content[at + 1 :]
        )
    return {**flipped, "cut": content[: size // 2], "emptied": b"", "longer": content + b"0", "deleted": None}


def test_flipped_bits_truncation_and_loss_of_any_file_are_refused(step_dir: Path) -> None:
    state = abstract(make_state(5))
    for name in files_of(step_dir):
        path = step_dir / name
        content = path.read_bytes()
        for damage, damaged in damages(content).items():
            path.unlink() if damaged is None else path.write_bytes(damaged)
            with pytest.raises(UserError) as refusal:
                restore(step_dir, state)
            assert path.name in str(refusal.value) and "--fallback" in str(refusal.value), damage
            assert "\n" not in str(refusal.value)
            path.write_bytes(content)
    restore(step_dir, state)  # whole again


@pytest.mark.parametrize("name", ["state/params.embed/9.9", "notes.txt", "state/link"])
def test_unlisted_file_is_refused(step_dir: Path, name: str) -> None:
    path = step_dir / name
    path.symlink_to(ROOT) if path.name == "link" else path.write_text("x")
    with pytest.raises(UserError, match=f"{path.name} is not listed"):
        verify(step_dir)


def test_falls_back_only_when_told(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    save_steps(folder, 1, 2, 3, keep=Keep(3))
    damaged = sorted((folder / "00000003/state").rglob("0.*"))[0]
    flip_bit(damaged, 7)
    (folder / "00000002/manifest.json").unlink()

    assert find_step(tmp_path) == folder / "00000003"
    with pytest.raises(UserError, match="--fallback"):
        restore(find_step(tmp_path), abstract(make_state(3)))

    step_dir, skipped = newest_intact(tmp_path)
    assert step_dir == folder / "00000001"
    assert [path for path, _ in skipped] == [folder / "00000003", folder / "00000002"]
    assert str(damaged) in skipped[0][1] and "no manifest.json" in skipped[1][1]

    for path, _ in skipped:
        set_aside(path)
    assert list_steps(folder) == [1]
    save_steps(folder, 2)
    assert find_step(tmp_path) == folder / "00000002"

    for step in (1, 2):
        (folder / f"{step:08d}/state/_METADATA").unlink()
    with pytest.raises(UserError, match=r"none of the 2 checkpoints.*_METADATA is missing"):
        newest_intact(tmp_path)


def seal_steps(folder: Path, *steps: int) -> None:
    """Checkpoints that hold one small file each."""
    for step in steps:
        step_path(folder, step).mkdir(parents=True)
        (step_path(folder, step) / "file").write_text(f"{step}")
        seal(step_path(folder, step), Manifest("train", step, 8 * step, 64 * step, {}, {}))


def test_the_run_of_a_checkpoint_has_a_name(tmp_path: Path, monkeypatch) -> None:
    """Of one that lies in no run's folder of checkpoints it is the checkpoint."""
    step_dir = tmp_path / "run" / "checkpoints" / "00000001"
    step_dir.mkdir(parents=True)
    assert run_folder(step_dir) == tmp_path / "run"
    assert run_folder(tmp_path / "00000001") == tmp_path / "00000001"
    for inside, given in (("run", "checkpoints/00000001"), ("run/checkpoints", "00000001"),
                          ("run/checkpoints", "../checkpoints/00000001")):  # fmt: skip
        monkeypatch.chdir(tmp_path / inside)
        assert run_folder(Path(given)) == tmp_path / "run"


def test_sealing_waits_until_all_is_on_the_disk(tmp_path: Path, monkeypatch) -> None:
    """Files first, then the manifest that says they are whole, and the folders that name them."""
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.fstat(descriptor).st_ino))
    files = [tmp_path / "a", tmp_path / "state" / "b"]
    for file in files:
        file.parent.mkdir(exist_ok=True)
        file.write_text(file.name)
    seal(tmp_path, Manifest("params", 1, 8, 64, {}, {}))

    def inodes(*paths: Path) -> set[int]:
        return {path.stat().st_ino for path in paths}

    assert set(synced[:2]) == inodes(*files)
    assert {synced[2]} == inodes(tmp_path / MANIFEST)
    assert set(synced[3:]) == inodes(tmp_path, tmp_path / "state")


def test_a_new_folder_is_on_the_disk_under_its_name(tmp_path: Path, monkeypatch) -> None:
    step, params = tmp_path / "run" / "00000001", tmp_path / "imported" / "params"
    synced: list[tuple[int, bool, bool]] = []

    def sync(descriptor: int) -> None:
        synced.append((os.fstat(descriptor).st_ino, step.exists(), params.exists()))

    monkeypatch.setattr(os, "fsync", sync)
    save_steps(step.parent, 1)
    assert synced[-1] == (step.parent.stat().st_ino, True, False)
    params.parent.mkdir()
    save_params(params, make_state(1).params, dataclasses.replace(make_manifest(1), kind="params"))
    assert synced[-1] == (params.parent.stat().st_ino, True, True)


def test_a_manifests_hash_does_not_depend_on_the_order_of_its_fields() -> None:
    expected = hashlib.sha256(b'{"a": {"c": 1, "d": [2]}, "b": null}').hexdigest()
    assert digest({"b": None, "a": {"d": [2], "c": 1}}) == expected
    assert digest({"a": {"c": 1, "d": [2]}, "b": None}) == expected


class Refused(Exception):
    """A start may refuse what an older checkpoint says."""


def test_where_a_start_resumes(tmp_path: Path) -> None:
    seen, said = [], []

    def start(from_step: int | None = None, fallback: bool = False, check=None) -> Path | None:
        check = check or (lambda manifest: seen.append(manifest.step))
        return find_start(tmp_path, from_step, fallback, check, said.append)

    def refuse(manifest: Manifest) -> None:
        raise Refused

    assert start() is start(fallback=True) is None
    with pytest.raises(UserError, match=r"--from-step 3 is not there: \S+ holds none"):
        start(3)
    seal_steps(tmp_path, 3, 5, 8, 9)
    with pytest.raises(UserError, match=r"--from-step 4 is not there: \S+ holds steps 3, 5, 8, 9"):
        start(4)
    assert (start(), seen) == (step_path(tmp_path, 9), [])
    assert (start(5), seen) == (step_path(tmp_path, 5), [5])
    for step in (8, 9):
        (step_path(tmp_path, step) / "file").write_text("another")
    assert start() == step_path(tmp_path, 9)  # damaged: opening it says so

    with pytest.raises(Refused):
        start(fallback=True, check=refuse)
    assert list_steps(tmp_path) == [3, 5, 8, 9] and not said  # nothing is renamed before that
    assert start(fallback=True) == step_path(tmp_path, 5) and seen == [5, 5]
    assert [line.split(":")[0] for line in said] == [
        f"checkpoint {step:08d} is damaged and now damaged-{step:08d}; resuming from 00000005"
        for step in (9, 8)
    ]
    assert list_steps(tmp_path) == [3, 5]
    assert start(fallback=True) == step_path(tmp_path, 5) and len(said) == 2

    seal_steps(tmp_path, 9)  # made again, and damaged again
    with pytest.raises(UserError, match=r"damaged-00000009 exists already: remove it"):
        set_aside(step_path(tmp_path, 9))
    assert list_steps(tmp_path) == [3, 5, 9]


def test_newer_steps_are_left_under_names_of_their_own(tmp_path: Path) -> None:
    names: list[list[str]] = []
    for _ in range(3):
        seal_steps(tmp_path, *({3, 5, 8} - set(list_steps(tmp_path))))
        names.append([path.name for path in leave_newer(tmp_path, 4)])
        assert list_steps(tmp_path) == [3]
    assert names == [[f"left-0000000{step}{again}" for step in (5, 8)] for again in ("", "-2", "-3")]
    assert (tmp_path / "left-00000008-3" / "file").read_text() == "8"
    assert leave_newer(tmp_path, 3) == []


def test_a_resumed_run_counts_on_and_says_who_trained_it_before() -> None:
    """Everything of the older checkpoint but the settings; the other engine is named, once it changes."""
    grown = {"operation": "grow", "step": 2}
    old = Manifest(
        "train", 7, 56, 448, {"lr": 1}, {"name": "old"}, {"cursor": 56}, {"good": True},
        chat_template="{{ x }}", lineage=[grown], code={"jax": "1"},
    )  # fmt: skip
    new = Manifest("train", 0, 0, 0, {"lr": 2}, {"name": "new"}, {"cursor": 0}, code={"jax": "2"})
    same = dataclasses.replace(
        new, step=7, sequences=56, tokens=448, health={"good": True}, lineage=[grown], chat_template="{{ x }}"
    )
    assert new.resumed_from(old) == same
    by_torch = dataclasses.replace(new, code={"torch": "3"})
    change = {"operation": "change_engine", "from": "JAX", "to": "PyTorch", "step": 7, "sequences": 56,
              "tokens": 448, "code": {"jax": "1"}}  # fmt: skip
    expected = dataclasses.replace(same, code={"torch": "3"}, lineage=[grown, change])
    assert by_torch.resumed_from(old) == expected
    assert old.lineage == [grown]


def test_code_that_is_not_run_may_be_missing_from_an_exported_folder(tmp_path: Path) -> None:
    """transformers' own, which a download may leave out; of a checkpoint nothing may be missing."""
    for name, message in ((EXPORT_MANIFEST, None), (MANIFEST, "modeling.py is missing")):
        folder = tmp_path / name
        folder.mkdir()
        for file in ("modeling.py", "weights"):
            (folder / file).write_text(file)
        seal(folder, Manifest("params", 1, 8, 64, {}, {}), name)
        (folder / "modeling.py").unlink()
        with contextlib.nullcontext() if message is None else pytest.raises(UserError, match=message):
            verify(folder, name)
        (folder / "weights").unlink()
        with pytest.raises(UserError, match=r"is missing"):
            verify(folder, name)


def test_the_commit_that_wrote_a_checkpoint_is_that_of_the_checkout(tmp_path: Path) -> None:
    def git(*arguments: str) -> str:
        command = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b", *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    (tmp_path / "broken" / ".git").mkdir(parents=True)
    assert git_commit(tmp_path) is git_commit(tmp_path / "broken") is None
    git("init")
    (tmp_path / "file").write_text("1")
    git("add", "file")
    git("commit", "-m", "first")
    commit = git("rev-parse", "HEAD")
    assert git_commit(tmp_path) == commit
    (tmp_path / "file").write_text("2")
    assert git_commit(tmp_path) == f"{commit}-dirty"
    assert code_version.__wrapped__()["commit"] == git_commit(ROOT)


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda s: s.params.update(embed=jnp.zeros((64, 16))),
            r"params/embed is float32\[64, 32\].*float32\[64, 16\]",
        ),
        (lambda s: s.params.update(embed=s.params["embed"].astype(jnp.int32)), r"float32\[.*int32\[64, 32\]"),
        (
            lambda s: s.params.update(more=jnp.zeros(1)),
            r"params/more is missing in the checkpoint.*float32\[1\] here",
        ),
        (lambda s: s.params.pop("embed"), r"params/embed is float32.*missing here"),
    ],
)
def test_another_tree_is_refused_with_both_sides(saved: Path, change: Any, message: str) -> None:
    state = make_state(5)
    change(state)
    with pytest.raises(UserError, match=message):
        restore(saved, abstract(state))
    with pytest.raises(UserError, match=message):
        restore_params(saved, abstract(state.params))


# Which steps there are


def test_keeps_the_last_and_every_nth(tmp_path: Path) -> None:
    save_steps(tmp_path, *range(1, 9), keep=Keep(2, 3))
    assert list_steps(tmp_path) == [3, 6, 7, 8]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["00000003", "00000006", "00000007", "00000008"]
    for step in (3, 8):
        assert_same_bits(restore(tmp_path / f"{step:08d}", abstract(make_state(step))), make_state(step))


def test_a_step_is_saved_once_and_never_before_another(tmp_path: Path) -> None:
    save_steps(tmp_path, 4)
    before = (tmp_path / "00000004/manifest.json").stat().st_mtime_ns
    save_steps(tmp_path, 4)
    assert (tmp_path / "00000004/manifest.json").stat().st_mtime_ns == before
    with pytest.raises(ValueError, match="step 3 after 4"):
        save_steps(tmp_path, 3)


def test_find_step_says_what_is_there(saved: Path, tmp_path: Path) -> None:
    assert find_step(saved) == find_step(saved.parent) == find_step(saved.parent.parent) == saved
    with pytest.raises(UserError, match="nowhere does not exist"):
        find_step(tmp_path / "nowhere")
    with pytest.raises(UserError, match="is empty"):
        find_step(tmp_path)
    (tmp_path / "readme").write_text("x")
    with pytest.raises(UserError, match="holds readme"):
        find_step(tmp_path)
    with pytest.raises(UserError, match="is a file"):
        find_step(tmp_path / "readme")
    dated_run = tmp_path / "20260101"  # a run folder whose name looks like a step's
    shutil.copytree(saved.parent, dated_run / "checkpoints")
    assert find_step(dated_run) == dated_run / "checkpoints" / saved.name


def test_leftovers_of_killed_saves_are_removed(tmp_path: Path) -> None:
    save_steps(tmp_path, 1)
    for name in (".00000002.partial/state", ".00000000.deleted"):
        (tmp_path / name).mkdir(parents=True)
    assert list_steps(tmp_path) == [1]
    Checkpointer(tmp_path, Keep()).close()
    assert [p.name for p in tmp_path.iterdir()] == ["00000001"]
