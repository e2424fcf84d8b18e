"""The guard's rule in both frameworks, and which checkpoints survive a streak of skipped updates."""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from core.checkpoint.manifest import Manifest, seal
from core.checkpoint.steps import Keep, dispensable_steps, good_steps, list_steps, step_path
from core.run.guard import GuardConfig, Health, changed_measure, norm_sigma, spike_limit
from port_torch.training.step import Guard as TorchGuard
from train_tpu.step import Controls, Guard, _acceptable, _remember, emptied

WINDOW = 64


def manifest(step: int = 0, health: dict | None = None, **run) -> Manifest:
    return Manifest(
        kind="train", step=step, sequences=0, tokens=0,
        config={"model": {"n_layers": 2}, "run": {"batch": 4, "z_loss": 0.0, **run}},
        tokenizer={}, data={"fingerprint": run.pop("fingerprint", "f"), "cursor": 0}, health=health,
    )  # fmt: skip


def decisions_of_jax(losses: np.ndarray, norms: np.ndarray, sigma: float, size: int = WINDOW) -> list[bool]:
    window, zero = jnp.zeros(size), jnp.zeros((), jnp.int32)
    guard = Guard(window, window, zero, zero, zero)
    controls = Controls(jnp.float32(0), jnp.float32(sigma), jnp.int32(10**6), jnp.uint32(0))
    made = []
    acceptable, remember = jax.jit(_acceptable), jax.jit(_remember)
    for loss, norm in zip(losses, norms, strict=True):  # float32
        ok = acceptable(guard, loss, norm, controls)
        guard = remember(guard, loss, norm, ok)
        made.append(bool(ok))
    return made


def decisions_of_torch(losses: np.ndarray, norms: np.ndarray, sigma: float, size: int = WINDOW) -> list[bool]:
    guard = TorchGuard(GuardConfig(window=size, sigma=sigma, halt_after=10**6), torch.device("cpu"))
    return [not guard.refuses(*pair) for pair in zip(torch.tensor(losses), torch.tensor(norms), strict=True)]


def decisions_of_numpy(losses: np.ndarray, norms: np.ndarray, sigma: float, size: int = WINDOW) -> list[bool]:
    """The rule as GuardConfig has it, in float64 and with a list."""
    kept: list[tuple[float, float]] = []
    made: list[bool] = []
    skipped = 0
    for pair in zip(losses.tolist(), norms.tolist(), strict=True):
        ok = bool(np.isfinite(pair).all())
        mends = len(kept) < size and skipped > 0
        if ok and len(kept) >= 16 and not mends:
            recent = np.array(kept[-size:])
            wide = sigma * np.sqrt(size / len(recent)) * np.array([1, min(2**skipped, 512)])
            ok = bool((pair <= recent.mean(0) + wide * recent.std(0)).all())
        if ok:
            kept.append(pair)
        skipped = 0 if ok else skipped + 1
        made.append(ok)
    return made


def curve() -> tuple[np.ndarray, np.ndarray]:
    """Losses and norms of 100 updates of a young run, with spikes early and late and a NaN."""
    rng = np.random.default_rng(0)
    steps = np.arange(100)
    losses = 2 + 8 * np.exp(-steps / 15) + rng.normal(0, 0.05, 100)
    norms = 0.5 + 20 * np.exp(-steps / 5) + rng.normal(0, 0.02, 100)
    losses[[20, 80]] += 100
    norms[[30, 90]] += 200
    losses[50] = np.nan
    losses[5] = 1000.0  # before the guard can judge
    return losses.astype(np.float32), norms.astype(np.float32)


def test_both_trainers_refuse_what_the_rule_says():
    losses, norms = curve()
    expected = decisions_of_numpy(losses, norms, 4.0)
    assert [i for i, ok in enumerate(expected) if not ok] == [30, 50, 80, 90]
    losses[5] = 8.0
    expected = decisions_of_numpy(losses, norms, 4.0)
    assert [i for i, ok in enumerate(expected) if not ok] == [20, 30, 50, 80, 90]  # before a window of 64
    assert decisions_of_jax(losses, norms, 4.0) == decisions_of_torch(losses, norms, 4.0) == expected
    off = decisions_of_numpy(losses, norms, np.inf)
    assert decisions_of_jax(losses, norms, 0.0) == decisions_of_torch(losses, norms, 0.0) == off


def test_parameters_that_overshoot_while_the_rate_rises_are_mended():
    """As port_torch.train had them (mtlm1-tiny, AdamW, 8 x 256 bytes): the update after the first high one
    made the loss 3.31 again; when all were skipped, the run was halted."""
    losses = np.r_[np.linspace(5.5, 3.3, 27), 5.17, 4.99, 3.31, 3.33]
    norms = np.r_[np.linspace(6.0, 0.6, 27), 105.2, 97.3, 2.6, 2.3]
    expected = [True] * 27 + [False] + [True] * 3
    for decisions in (decisions_of_jax, decisions_of_torch, decisions_of_numpy):
        assert decisions(np.float32(losses), np.float32(norms), 8.0) == expected


@pytest.mark.parametrize("size, refused", [(128, [140]), (64, [140, 141])])
def test_norms_that_rise_while_losses_fall_are_mended(size, refused):
    """As a run had them from step 2509 on (mtlm2-40m, Muon, 128 x 1024 tokens of 31.6M distinct ones): its
    twelfth pass over the text begins at 2649, with norms of 13 to 16 deviations of a window of 128, and 17
    to 21 of one of 64. All ten were skipped, and the run was halted."""
    told = json.loads((Path(__file__).parent / "start_of_a_pass.json").read_text())
    until = refused[-1] + 2  # the one after the last refused; those after it met parameters as they were
    losses, norms = np.float32(told["losses"][:until]), np.float32(told["norms"][:until])
    assert losses[140:].max() < losses[:140].mean()
    for decisions in (decisions_of_jax, decisions_of_torch, decisions_of_numpy):
        made = decisions(losses, norms, 8.0, size)
        assert [i for i, ok in enumerate(made) if not ok] == refused


@pytest.mark.parametrize("loss, norm", [(4.0, 1.0), (4.0, 5.0), (2.0, 1e6), (np.nan, 1.0), (2.0, np.inf)])
def test_a_full_window_refuses_what_stays_high(loss, norm):
    """Losses, which have no rising rate to blame there; and norms that no update mends, so many in a row
    that doubling without end would let them through."""
    full, n = np.random.default_rng(0).normal(2, 0.02, 2 * WINDOW), 40
    losses, norms = np.float32(np.r_[full, [loss] * n]), np.float32(np.r_[full / 2, [norm] * n])
    for decisions in (decisions_of_jax, decisions_of_torch, decisions_of_numpy):
        assert decisions(losses, norms, 8.0) == [True] * 2 * WINDOW + [False] * n


def test_the_norms_limit_doubles_with_the_streak_nine_times():
    """And is to the bit what it was while no update has been skipped."""
    sigma = np.float32(8.1)
    expected = [sigma * 2 ** min(streak, 9) for streak in range(14)]
    for streak, limit in enumerate(expected):
        assert norm_sigma(jnp.float32(sigma), jnp.int32(streak)) == limit
        assert norm_sigma(torch.tensor(sigma), torch.tensor(streak)) == limit


def test_the_first_update_that_is_judged_has_sixteen_before_it():
    quiet = np.random.default_rng(3).normal(2, 0.02, 40)
    for at, refused in ((15, []), (16, [16])):
        losses = quiet.copy()
        losses[at] = 9.0
        for decisions in (decisions_of_jax, decisions_of_torch, decisions_of_numpy):
            made = decisions(np.float32(losses), np.float32(quiet / 2), 8.0)
            assert [i for i, ok in enumerate(made) if not ok] == refused


def test_a_full_window_has_the_plain_deviation():
    values = np.random.default_rng(1).normal(3, 0.1, WINDOW)
    expected = values.mean() + 8 * values.std()
    assert float(spike_limit(jnp.float32(values), jnp.ones(WINDOW), 8.0)) == pytest.approx(expected, rel=1e-5)
    # With a quarter of it filled it is twice as wide; what else stands in it does not count.
    held = np.arange(WINDOW) < WINDOW // 4
    few = values[held]
    expected = few.mean() + 2 * 8 * few.std()
    for array in (jnp.float32, torch.tensor):
        limit = spike_limit(array(np.where(held, values, 99)), array(1.0 * held), 8.0)
        assert float(limit) == pytest.approx(expected, rel=1e-5)


def test_the_window_is_emptied_when_what_it_measures_changes():
    old = manifest()
    assert changed_measure(old, manifest()) == []
    assert changed_measure(old, manifest(lr=1e4)) == []  # against which the window protects
    assert changed_measure(old, manifest(batch=2)) == ["batch"]
    assert changed_measure(old, manifest(z_loss=1e-4)) == ["z_loss"]
    assert changed_measure(old, manifest(fingerprint="g")) == ["data"]
    older = dataclasses.replace(old, config={"model": {"n_layers": 2}, "run": {"batch": 4}})
    assert changed_measure(older, manifest(document_mask=False)) == []  # which is what it had
    assert changed_measure(older, manifest(z_loss=1e-4, document_mask=True)) == ["z_loss", "document_mask"]
    grown = dataclasses.replace(manifest(), config={**manifest().config, "model": {"n_layers": 4}})
    assert changed_measure(old, grown) == ["layers"]

    # Another text, in batches of 2 instead of 128: its losses are beyond the old window's limit.
    rng = np.random.default_rng(2)
    full = Guard(
        jnp.float32(rng.normal(3, 0.02, WINDOW)), jnp.float32(rng.normal(0.3, 0.01, WINDOW)),
        jnp.int32(200), jnp.int32(0), jnp.int32(0),
    )  # fmt: skip
    controls = Controls(jnp.float32(0), jnp.float32(8), jnp.int32(10), jnp.uint32(0))
    small = list(zip(jnp.float32(rng.normal(5, 0.5, 13)), jnp.float32(rng.normal(2.5, 0.5, 13)), strict=True))

    def refused(guard: Guard) -> int:
        n = 0
        for pair in small:
            ok = _acceptable(guard, *pair, controls)
            n += not ok
            guard = _remember(guard, *pair, ok)
        return n

    assert refused(full) == 13 and refused(emptied(full)) == 0


def save(folder: Path, health: Health, step: int, keep_last: int = 2) -> None:
    """A checkpoint without arrays, as both trainers mark it, and what they delete after it."""
    step_dir = step_path(folder, step)
    step_dir.mkdir(parents=True)
    seal(step_dir, manifest(step, health.record()))
    for other in dispensable_steps(folder, Keep(keep_last)):
        path = step_path(folder, other)
        (path / "manifest.json").unlink()
        path.rmdir()


def see(health: Health, *losses: float, streak: int = 0) -> None:
    for n, loss in enumerate(losses, 1):
        health.see(loss, streak and n)


def test_the_level_is_the_mean_of_the_last_eight_that_were_applied(tmp_path: Path):
    health = Health(tmp_path, manifest())
    assert health.loss is None
    see(health, *map(float, range(12)))
    see(health, 99.0, 99.0, streak=1)
    assert health.loss == sum(range(4, 12)) / 8


def test_three_ruined_starts_leave_the_good_checkpoints(tmp_path: Path):
    health = Health(tmp_path, manifest())
    for step, loss in ((20, 4.0), (30, 3.5), (40, 3.0)):
        see(health, *[loss] * 8)
        save(tmp_path, health, step)
    assert list_steps(tmp_path) == [30, 40]

    step, start = 40, manifest(health=health.record())
    for first in (True, False, False):
        # A few ruinous updates that are applied, then only refused ones; a periodic save amid either.
        health = Health(tmp_path, start)
        see(health, *(3.0, 5.5, 80.0)[: 3 * first])
        save(tmp_path, health, step + 3)
        see(health, *[float("nan")] * 10, streak=1)
        save(tmp_path, health, step + 8)
        save(tmp_path, health, step := step + 13)
        start = manifest(health=health.record())
        said = health.after_halt(step)
        assert "has risen from 3" in said and "--from-step 40 --lr" in said and "--sigma 0" in said
    assert list_steps(tmp_path) == [30, 40, 74, 79]
    assert good_steps(tmp_path) == [30, 40]

    # The way out: from step 40, and all is as before as soon as new good ones are there.
    health = Health(tmp_path, manifest())
    for step in (90, 100):
        see(health, *[2.9] * 8)
        save(tmp_path, health, step)
    assert list_steps(tmp_path) == [90, 100]


def test_a_streak_alone_does_not_displace_what_was_before_it(tmp_path: Path):
    health = Health(tmp_path, manifest())
    see(health, *[3.0] * 8)
    for step in (10, 20):
        save(tmp_path, health, step)
    see(health, *[9.0] * 4, streak=1)
    for step in (24, 26, 28):
        save(tmp_path, health, step)
    assert list_steps(tmp_path) == [10, 20, 26, 28]
    assert "the state before them is saved as step 28" in health.after_halt(28)


def test_levels_of_another_measure_do_not_compare(tmp_path: Path):
    health = Health(tmp_path, manifest())
    see(health, *[3.0] * 8)
    save(tmp_path, health, 10)
    other = Health(tmp_path, manifest(fingerprint="other text"))
    see(other, *[6.0] * 8)
    assert not other.rose and other.record()["good"]
    same = Health(tmp_path, manifest(lr=1.0))
    see(same, *[6.0] * 8)
    assert same.rose and not same.record()["good"]


def test_a_run_without_an_older_checkpoint_is_told_to_start_anew(tmp_path: Path):
    health = Health(tmp_path, manifest())
    see(health, *[float("nan")] * 10, streak=1)
    save(tmp_path, health, 10)
    assert "there is no older checkpoint" in health.after_halt(10)


def test_checkpoints_that_say_nothing_of_health_are_good(tmp_path: Path):
    health = SimpleNamespace(record=lambda: None)
    for step in (1, 2, 3):
        save(tmp_path, health, step)
    assert good_steps(tmp_path) == list_steps(tmp_path) == [2, 3]
    assert '"health"' not in (step_path(tmp_path, 3) / "manifest.json").read_text()
