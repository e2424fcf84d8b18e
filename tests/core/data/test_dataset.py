import errno
import gc
import itertools
import json
import logging
import os
import resource
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from bench import loader
from core.data import packing
from core.data import windows as module
from core.data.batches import _import_grain, full_batches, heldout_windows, record_at, train_batches
from core.data.dataset import Dataset, Split, open_dataset, open_windows, write_manifest
from core.data.windows import BadRecord
from core.errors import UserError

CONTEXT, RECORDS, VOCAB = 16, 103, 500
RECORD = {"name": "random", "sha256": "0" * 64, "vocab_size": VOCAB}


def make(folder: Path, tokens: np.ndarray, heldout: np.ndarray | None = None, predicted: int = 0) -> Dataset:
    """A dataset whose train windows are the rows of `tokens`."""
    folder.mkdir()
    splits = {"train": tokens} | ({} if heldout is None else {"held-out": heldout})
    packing.write_splits(folder, CONTEXT, splits)
    counts = {"train": len(tokens) * CONTEXT + 1, "held-out": predicted + 1}
    listed = [Split(name, 0, 0, counts[name], len(windows)) for name, windows in splits.items()]
    return write_manifest(folder, CONTEXT, RECORD, listed, dropped={}, sources=[])


@pytest.fixture(scope="module")
def tokens() -> np.ndarray:
    return np.random.default_rng(0).integers(0, VOCAB, (RECORDS, CONTEXT + 1)).astype(np.uint16)


@pytest.fixture
def dataset(tmp_path, tokens, monkeypatch) -> Dataset:
    monkeypatch.setattr(packing, "WINDOWS_PER_SHARD", 25)  # several files
    return make(tmp_path / "data", tokens)


def take(dataset: Dataset, n: int, **options) -> list:
    options = {"seed": 0, "batch": 8, "vocab_size": VOCAB} | options
    batches = train_batches(dataset, **options)
    taken = list(itertools.islice(batches, n))
    batches.close()
    return taken


def rows(batches: list) -> np.ndarray:
    return np.concatenate([b.tokens for b in batches])


def test_rows_are_the_records_they_say(dataset, tokens):
    assert len(dataset.files) >= 5
    for batch in take(dataset, 14):
        assert batch.tokens.dtype == np.uint16 and batch.tokens.shape == (8, CONTEXT + 1)
        assert (batch.tokens == tokens[batch.records]).all()
        assert not batch.bad.any()


def test_an_epoch_visits_every_record_once_and_differs_from_the_next(dataset):
    visited = np.concatenate([b.records for b in take(dataset, 3, batch=RECORDS)]).reshape(3, RECORDS)
    for epoch in visited:
        assert sorted(epoch) == list(range(RECORDS))
    for a, b in itertools.combinations(visited, 2):
        # Two random orders of 103 agree in one place on average; more than 8 has odds below 1e-5.
        assert (a == b).sum() <= 8


def test_batches_depend_on_seed_and_first_alone(dataset):
    sequence = rows(take(dataset, 34))
    for size, start in ((1, 0), (5, 0), (32, 0), (8, 3), (7, 101), (16, 200)):
        batches = take(dataset, 4, batch=size, start=start)
        assert [b.first for b in batches] == [start + i * size for i in range(4)]
        assert (rows(batches) == sequence[start : start + 4 * size]).all()
    assert (rows(take(dataset, 14)) == sequence[: 14 * 8]).all()  # into the second epoch
    assert not (rows(take(dataset, 4, seed=1)) == sequence[: 4 * 8]).all()


def test_hosts_read_their_rows_of_the_same_batch(dataset):
    whole = take(dataset, 14)
    for hosts in (2, 4):
        size = 8 // hosts
        parts = [take(dataset, 14, rows=slice(h * size, (h + 1) * size)) for h in range(hosts)]
        for batch, *of_hosts in zip(whole, *parts, strict=True):
            assert (np.concatenate([p.tokens for p in of_hosts]) == batch.tokens).all()
            assert (np.concatenate([p.records for p in of_hosts]) == batch.records).all()
            assert {p.first for p in of_hosts} == {batch.first}


def test_resumed_in_the_middle_of_an_epoch_equals_uninterrupted(dataset):
    whole = take(dataset, 15)
    before = take(dataset, 7)
    after = take(dataset, 8, start=before[-1].first + 8)
    assert (rows(before + after) == rows(whole)).all()


def test_seeds_do_not_share_epochs():
    orders = {
        (seed, epoch): tuple(record_at(epoch * 50 + i, 50, seed) for i in range(50))
        for seed in range(3)
        for epoch in range(3)
    }
    assert len(set(orders.values())) == 9


def test_order_is_the_one_of_earlier_versions():
    # Written down once: a run that is resumed after an upgrade must go on in the same order.
    assert [record_at(i, 1000, 0) for i in (0, 1, 2, 999, 1000, 123_456)] == [415, 185, 212, 170, 746, 563]
    assert [record_at(i, 1, 3) for i in range(3)] == [0, 0, 0]


def test_neighbours_in_the_order_are_unrelated():
    n, batch = 1_000_000, 256
    places = np.array([record_at(i, n, seed) for seed in range(20) for i in range(5 * batch)]) / n
    # The mean of 256 uniform numbers has a standard deviation of 1 / sqrt(12 * 256). Over 100 batches the
    # measured one is within 30% of it (4 sigma: its relative error is 1 / sqrt(2 * 100) = 7%).
    ratio = places.reshape(-1, batch).mean(axis=1).std() * np.sqrt(12 * batch)
    assert 0.7 < ratio < 1.3


def test_truncated_file_is_named_or_skipped(dataset, tokens):
    file = sorted(dataset.path.glob("windows-train*"))[2]
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(UserError, match=rf"train record (5|6|7)\d in {file} cannot be read"):
        take(dataset, 20)
    for batch in take(dataset, 13, on_bad="skip"):
        assert (batch.bad <= ((batch.records >= 50) & (batch.records < 75))).all()
        assert (batch.tokens[~batch.bad] == tokens[batch.records[~batch.bad]]).all()


def test_one_damaged_record_is_named_or_skipped(tmp_path, tokens, monkeypatch):
    monkeypatch.setattr(packing, "WINDOWS_PER_SHARD", 25)
    dataset = make(tmp_path / "data", tokens)
    damage_one(dataset, 60)
    with pytest.raises(UserError, match=r"train record 60 in .*00002 cannot be read"):
        take(dataset, 20)
    batches = take(dataset, 26, on_bad="skip")
    for batch in batches:
        assert (batch.bad == (batch.records == 60)).all()
        assert (batch.tokens[batch.bad] == 0).all()
        assert (batch.tokens[~batch.bad] == tokens[batch.records[~batch.bad]]).all()
    assert sum(b.bad.sum() for b in batches) >= 2  # 208 windows are two epochs


def damage_one(dataset: Dataset, record: int) -> None:
    """Flips one bit in the stored bytes of one record, wherever the writer put them."""
    file = sorted(dataset.path.glob("windows-train*"))[record // 25]
    original = file.read_bytes()
    position = 100
    while position < len(original):
        changed = bytearray(original)
        changed[position] ^= 1
        file.write_bytes(changed)
        found = unreadable(dataset)
        if found == [record]:
            return
        # They lie there in their order, each in more than 20 bytes.
        position += 20 * (record - found[0]) if len(found) == 1 and found[0] < record else 9
    raise AssertionError(f"no byte of {file} belongs to record {record} alone")


def unreadable(dataset: Dataset) -> list[int]:
    source = open_windows(dataset, "train")
    bad = []
    for record in range(50, 75):
        try:
            source.read([record], VOCAB)
        except BadRecord:
            bad.append(record)
    return bad


def n_open() -> int:
    """Files that this process has open."""
    return len(list(Path("/proc/self/fd").iterdir()))


def test_few_files_are_open_at_a_time(tmp_path, tokens, monkeypatch):
    monkeypatch.setattr(packing, "WINDOWS_PER_SHARD", 2)
    dataset = make(tmp_path / "data", tokens)
    assert len(list(dataset.path.glob("windows-train*"))) == 52
    monkeypatch.setattr(module, "most_open", lambda: 3)
    opened = open_windows(dataset, "train")
    order = np.random.default_rng(0).permutation(RECORDS).tolist()
    gc.collect()
    before = n_open()
    assert (np.concatenate([opened.read([n], VOCAB) for n in order]) == tokens[order]).all()
    assert n_open() <= before + 3
    assert (opened.read(order, VOCAB) == tokens[order]).all()
    other = open_windows(dataset, "train")  # of all that a process reads, as those of a mixture
    for n in order:
        opened.read([n], VOCAB), other.read([n], VOCAB)
    assert n_open() <= before + 3
    del opened, other
    gc.collect()
    assert n_open() == before


@pytest.mark.parametrize(
    ("may_open", "held_open"), [(1, 1), (3, 1), (256, 128), (1026, 512), (resource.RLIM_INFINITY, 512)]
)
def test_half_of_what_a_process_may_open_is_for_shards(monkeypatch, may_open, held_open):
    monkeypatch.setattr(resource, "getrlimit", {resource.RLIMIT_NOFILE: (may_open, -1)}.get)
    assert module.most_open() == held_open


def test_what_the_system_refuses_is_no_damaged_record(dataset, tokens):
    opened = open_windows(dataset, "train")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = os.dup(0)  # the lowest number that is free: no file can be opened below it
    os.close(free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free, hard))
    try:
        with pytest.raises(UserError, match="no damaged record is the cause: too many files are open"):
            opened.read_or_skip([3], VOCAB)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert (opened.read([3], VOCAB) == tokens[[3]]).all()  # the failure is not remembered

    file = sorted(dataset.path.glob("windows-train*"))[2]
    file.rename(file.with_suffix(".away"))
    for on_bad in ("fail", "skip"):
        with pytest.raises(UserError, match=r"record (5|6|7)\d in .*no damaged record.*No such file"):
            take(dataset, 20, on_bad=on_bad)


def test_an_input_error_of_a_damaged_file_is_not_called_damage(dataset, monkeypatch):
    damage_one(dataset, 60)

    def failing(folder, names, sync):
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(folder / names[0]))

    monkeypatch.setattr(module, "hash_files", failing)
    with pytest.raises(UserError, match=r"no damaged record is the cause: .*Input/output error"):
        open_windows(dataset, "train").read_or_skip([60], VOCAB)


def test_an_intact_file_is_never_damage(dataset, monkeypatch):
    def failing(self, records):
        raise RuntimeError("no")

    monkeypatch.setattr(module.Shards, "read", failing)
    with pytest.raises(UserError, match=r"record 60 in .*\(no\), though the file is what it was"):
        open_windows(dataset, "train").read_or_skip([60], VOCAB)


def flipped(content: bytes, bit: int) -> bytes:
    """The content with one bit changed."""
    changed = bytearray(content)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


@pytest.mark.parametrize("sealed", [True, False])
def test_a_flipped_bit_is_refused_or_changes_nothing(tmp_path, tokens, sealed):
    rng = np.random.default_rng(0)
    dataset = make(tmp_path / "data", tokens, tokens[:3], 3 * CONTEXT)
    if not sealed:  # as an older version wrote it
        content = json.loads((dataset.path / "dataset.json").read_text())
        del content["sha256"]
        (dataset.path / "dataset.json").write_text(json.dumps(content, indent=1) + "\n")
        dataset = open_dataset(dataset.path)
        assert not dataset.sealed

    def all_of_it() -> tuple:
        opened = open_dataset(dataset.path)
        return opened, *(heldout_windows(opened, split)[0].tobytes() for split in opened.splits)

    expected = all_of_it()
    refused = 0
    for file in sorted(dataset.path.iterdir()):
        original = file.read_bytes()
        for bit in rng.integers(0, 8 * len(original), 40 if file.suffix == ".json" else 10).tolist():
            file.write_bytes(flipped(original, bit))
            try:
                found = all_of_it()
            except UserError as error:
                assert str(dataset.path) in str(error)
                refused += 1
            else:
                if sealed or file.name != "dataset.json":
                    assert found == expected, (file, bit)
                else:  # what no hash of an older version covers
                    assert found[0].fingerprint == expected[0].fingerprint and found[1:] == expected[1:]
                    assert found[0].files == expected[0].files
        file.write_bytes(original)
    assert refused > 60
    assert all_of_it() == expected


def test_id_outside_the_vocabulary_is_named_or_skipped(tmp_path, tokens):
    changed = tokens.copy()
    changed[7, 3] = VOCAB
    dataset = make(tmp_path / "data", changed)
    with pytest.raises(
        UserError, match=rf"train record 7 in .* holds the token id {VOCAB}, but .* has {VOCAB}"
    ):
        take(dataset, 20)
    batches = take(dataset, 20, on_bad="skip")
    assert all((b.bad == (b.records == 7)).all() for b in batches)
    assert rows(take(dataset, 13, vocab_size=VOCAB + 1)).max() == VOCAB


def test_records_that_other_code_wrote_are_named(tmp_path, tokens):
    dataset = make(tmp_path / "data", tokens)
    features = dataset.path / "features.json"
    described = features.read_text()
    features.write_text(described.replace(f'"{CONTEXT + 1}"', f'"{CONTEXT + 2}"'))
    said = rf"its split train cannot be opened .*says {CONTEXT + 2}, not {CONTEXT + 1} tokens"
    with pytest.raises(UserError, match=said):
        take(dataset, 1)
    features.write_text(described)
    (file,) = dataset.path.glob("*train*.array_record*")
    for wrong, said in (
        (tokens[:, :-1], r"cannot be read"),
        (tokens.astype(np.uint32) + 2**16, r"holds the token id (65|66)\d{3}"),  # not that modulo 2^16
    ):
        other = tmp_path / f"of-{wrong.shape[1]}"
        other.mkdir()
        packing.write_splits(other, wrong.shape[1] - 1, {"train": wrong})
        file.write_bytes((other / file.name).read_bytes())
        with pytest.raises(UserError, match=rf"train record \d+ in .* {said}"):
            take(dataset, 1)


def test_reading_does_not_wait_for_tfds(dataset, tokens, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)  # importing it is an ImportError
    assert (open_windows(dataset, "train").read([7], VOCAB) == tokens[[7]]).all()


def test_heldout_windows(tmp_path, tokens):
    heldout = tokens[::-1][:10].copy()
    predicted = 9 * CONTEXT + 5
    dataset = make(tmp_path / "data", tokens, heldout, predicted)
    assert dataset.heldout == ["held-out"]
    windows, mask = heldout_windows(dataset, "held-out")
    assert (windows == heldout).all()
    assert mask.shape == (10, CONTEXT) and mask.sum() == predicted
    assert mask[:9].all() and mask[9].tolist() == [True] * 5 + [False] * (CONTEXT - 5)
    some, some_mask = heldout_windows(dataset, "held-out", limit=4)
    picked = [np.flatnonzero((heldout == w).all(axis=1))[0] for w in some]
    assert len(some) == 4 and max(np.diff(picked)) <= 3  # spread over all ten
    assert (some_mask == mask[picked]).all()
    assert len(heldout_windows(dataset, "held-out", limit=99)[0]) == 10
    with pytest.raises(UserError, match="no split 'valid': it has train, held-out"):
        heldout_windows(dataset, "valid")


def test_the_last_batch_is_filled_up_to_the_shape_of_all():
    values, flags = np.arange(1, 15).reshape(7, 2), np.ones(7, bool)
    found = list(full_batches(3, values, flags))
    assert [n for n, _ in found] == [3, 3, 1]
    assert {(part.shape, mask.shape) for _, (part, mask) in found} == {((3, 2), (3,))}
    for whole, parts in zip((values, flags), zip(*(parts for _, parts in found), strict=True), strict=True):
        joined = np.concatenate(parts)
        assert (joined[:7] == whole).all() and not joined[7:].any() and joined.dtype == whole.dtype


def test_importing_grain_leaves_the_log_of_absl_and_other_modules_as_they_were():
    log = logging.getLogger("absl")
    before, modules = log.level, dict(sys.modules)
    try:
        log.setLevel(logging.INFO)
        _import_grain.__wrapped__()
        assert log.level == logging.INFO
        assert all(sys.modules[name] is module for name, module in modules.items())
    finally:
        sys.modules.update(modules)
        log.setLevel(before)


def test_closing_ends_the_threads(dataset):
    before = threading.active_count()
    batches = train_batches(dataset, seed=0, batch=8, vocab_size=VOCAB)
    next(batches)
    batches.close()
    deadline = time.monotonic() + 10
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.02)
    assert threading.active_count() <= before


def test_benchmark_runs(capsys):
    assert loader.main(["--windows", "64", "--context", "32", "--seconds", "0.05", "--batches", "8"]) == 0
    assert "M tokens/s" in capsys.readouterr().out
