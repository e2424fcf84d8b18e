"""The file of watched updates, and what is said to be unhealthy: planted faults, found by name."""

import json

import numpy as np
import pytest

from core.errors import UserError
from core.run.log import WATCHED, RunLog
from core.run.symptoms import find_symptoms, new_layers
from core.run.watching import Sizes, Watched, make_record, norms_by_row, query_positions, read_watched

T, L = 6, 8


def record(scale: float = 1.0, n_layers: int = 2) -> dict:
    sizes = [Sizes(squares=4.0 * scale**2, largest=3.0, bad=0, n=4)] * (n_layers + 2)
    leaves = {"embed/table": 2.0, "layers/mlp/up/kernel": np.full(n_layers, scale), "norm/scale": 7.0}
    return make_record(
        n_layers, weights=leaves, gradients=leaves, updates=leaves, stream=sizes, added=sizes[:n_layers],
        entropies=[(1.5, 0.5)] * n_layers, uniform=2.6,
    )  # fmt: skip


def healthy() -> Watched:
    """Figures as a good run has them, none of them equal."""
    noise = 1 + 0.1 * np.random.default_rng(0).random((9, T, L + 2))
    levels = {"weight": 10.0, "gradient": 0.2, "update": 0.02, "rms": 1.0, "largest": 5.0, "not_finite": 0.0}
    rows = {name: level * x for (name, level), x in zip(levels.items(), noise, strict=False)}
    layers = {"added": 0.3, "entropy": 2.0, "lowest_entropy": 1.0}
    of_layers = {name: level * x[:, :L] for (name, level), x in zip(layers.items(), noise[6:], strict=True)}
    return Watched(np.arange(T) * 50, rows, of_layers, np.full(T, 2.6))


def test_norms_are_those_of_the_matrices_of_each_row():
    stacked = {"layers/attn/q/kernel": np.array([3.0, 6.0]), "layers/mlp/up/kernel": np.array([4.0, 8.0])}
    others = {"embed/table": 5.0, "layers/attn_norm/scale": np.array([9.0, 9.0]), "norm/scale": 2.0}
    assert norms_by_row(stacked | others, 2) == [5.0, 5.0, 10.0, 2.0]
    single = {"layers/0/attn/q/kernel": 3.0, "layers/1/attn/q/kernel": 6.0, "head/kernel": 1.0}
    assert norms_by_row(single | {"norm/scale": 2.0, "positions/table": 4.0}, 2) == [4.0, 3.0, 6.0, 1.0]


def test_sizes_leave_out_what_is_not_finite():
    # 3, 4 and a NaN: mean of the squares relative to 4 is (9/16 + 1) / 2.
    sizes = Sizes.of((4.0, (9 / 16 + 1) / 2, 1.0), 3)
    assert (sizes.rms, sizes.largest, sizes.bad) == (12.5**0.5, 4.0, 1)


@pytest.mark.parametrize("length", [2, 5, 16, 17, 1024])
def test_queries_are_spread_up_to_the_last_position(length):
    found = query_positions(length)
    assert len(found) == min(16, length) == len(set(found.tolist()))
    assert found[-1] == length - 1 and found[0] >= 0 and np.ptp(np.diff(found)) <= 1


def test_a_resumed_run_logs_again_what_came_after_its_checkpoint(tmp_path):
    log = RunLog(tmp_path, 0)
    for step in (0, 4, 8):
        log.watch(step, record(step + 1.0))
    log.close()
    with (tmp_path / WATCHED).open("a") as file:
        file.write('{"step": 12, "kind": "wa')  # of a process that was killed
    assert read_watched(tmp_path).steps.tolist() == [0, 4, 8]
    log = RunLog(tmp_path, 6)
    assert log.notice is None
    log.watch(8, record(float("inf")))
    log.close()
    found = read_watched(tmp_path)
    assert found.steps.tolist() == [0, 4, 8]
    assert found.of_rows["weight"][:, 1].tolist() == [1.0, 5.0, np.inf]
    assert found.of_rows["weight"][0].tolist() == [2.0, 1.0, 1.0, 7.0]
    assert found.of_rows["rms"][0].tolist() == [1.0] * 4


def test_what_cannot_be_read_is_refused(tmp_path):
    with pytest.raises(UserError, match="no watched updates: train with --watch-every 50"):
        read_watched(tmp_path)
    whole = {"step": 0, "kind": "watch"} | record()
    wrong = [json.dumps(whole | change) for change in ({"rms": [1, 2]}, {"uniform": "x"}, {"kind": "train"})]
    for damage in ('{"step": 0, "ki', "[]", *wrong):
        (tmp_path / WATCHED).write_text(f"{json.dumps(whole)}\n{damage}\n{json.dumps(whole)}\n")
        with pytest.raises(UserError, match=r"watch.jsonl is damaged \(line 2 cannot be read\)"):
            read_watched(tmp_path)
    other = {"step": 1, "kind": "watch"} | record(n_layers=3)
    (tmp_path / WATCHED).write_text(f"{json.dumps(whole)}\n{json.dumps(other)}\n")
    with pytest.raises(UserError, match="of different models"):
        read_watched(tmp_path)


def found_in(watched: Watched, grown: dict | None = None) -> list[tuple[str, str]]:
    return [(symptom.name, symptom.where) for symptom in find_symptoms(watched, grown)]


def test_a_healthy_run_has_no_symptoms():
    grown = {"step": 0, "sources": [*range(4), *range(4)], "how": ["copy"] * 8}
    assert found_in(healthy(), grown) == []


@pytest.mark.parametrize(
    ("field", "at", "value", "expected"),
    [
        ("weight", np.s_[3:, 4], np.inf, ("not finite", "layers/3")),
        ("not_finite", np.s_[4:, 6:], 0.5, ("not finite", "layers/5")),
        ("update", np.s_[2:4, 0], 4.0, ("exploding update", "embed")),
        ("weight", np.s_[0, 2:4], 0.4, ("exploding update", "layers/1 to layers/2")),
        ("gradient", np.s_[-2:, 3], 1e-5, ("dead layer", "layers/2")),
        ("added", np.s_[-2:, 5], 1e-3, ("dead layer", "layers/5")),
        ("entropy", np.s_[-2:, 1:3], 0.1, ("loss of entropy", "layers/1 to layers/2")),
        ("rms", np.s_[-2:, 2:9], 50.0, ("activations blow up", "layers/1")),
        ("rms", np.s_[-2:, 5:9], 50.0, ("activations blow up", "layers/4")),
        ("rms", np.s_[-2:, 8], 50.0, ("activations blow up", "layers/7")),
    ],
)
def test_each_planted_fault_is_named(field, at, value, expected):
    watched = healthy()
    for arrays in (watched.of_rows, watched.of_layers):
        if field in arrays:
            arrays[field][at] = value
    assert expected in found_in(watched)


def test_of_several_the_worst_is_given_with_its_figure():
    watched = healthy()
    watched.of_rows["rms"][:] = 1.0
    watched.of_layers["added"][-2:, [3, 5]] = 4e-3, 2e-3
    watched.of_layers["entropy"][-2:, [1, 6]] = 0.13, 0.052  # of 2.6
    dead, lost = find_symptoms(watched)
    assert dead.where == "layers/3, layers/5" and lost.where == "layers/1, layers/6"
    assert dead.figures.startswith("layers/5 adds 0.20% ")
    assert lost.figures.startswith("the attention of layers/6 has 0.052 nats, 2% of what")


def test_a_gradient_is_held_against_the_others_of_its_update():
    watched = healthy()
    watched.of_rows["gradient"][-2:] *= 1e-4  # of all layers: the loss has become flat
    assert found_in(watched) == []


def test_growth_leaves_a_seam():
    how = ["copy"] * 4 + ["identity"] * 4
    grown = {"step": 100, "sources": [*range(4), *range(4)], "how": how}
    watched = healthy()
    watched.of_layers["added"][:, 4:] *= 0.2
    (symptom,) = find_symptoms(watched, grown)
    assert (symptom.name, symptom.where) == ("growth's seam", "layers/4 to layers/7")
    assert "share added to the stream of the new layers are 0.2x those of the old ones" in symptom.figures
    assert new_layers([0, 0, 1, 1], ["copy"] * 4).tolist() == [False, True, False, True]
