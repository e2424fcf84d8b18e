import hashlib
import itertools
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from core.data import batches as module
from core.data import packing
from core.data.batches import heldout_windows, record_at, record_of, require_records, train_batches
from core.data.dataset import Dataset, Split, open_windows, write_manifest
from core.data.mixture import BLOCK, Mixture, Phase, describe_phases, phase_number, phases_of
from core.data.mixture_options import parse_data, parse_mixture
from core.data.windows import Windows
from core.errors import UserError

CONTEXT, VOCAB = 8, 500
SIZES = {"books": 57, "code": 31, "wiki": 103}
MASK = 2**64 - 1
PHASES = (
    Phase(0, (("books", 1200), ("wiki", 2800))),
    Phase(50_400, (("books", 2800), ("code", 7), ("wiki", 1193))),
    Phase(73_300, (("code", 4000),)),
    Phase(90_000, (("books", 1), ("wiki", 3999))),
)


def brute_force(phases: tuple[Phase, ...], seed: int) -> Iterator[tuple[str, int]]:
    """Source and rank of every window, counted one by one, in whole numbers of Python."""
    seen: Counter[str] = Counter()
    for phase, following in itertools.zip_longest(phases, phases[1:]):
        end = following.first if following else 10**12
        for block in itertools.count(phase.first, BLOCK):
            if block >= end:
                break
            digest = hashlib.sha256(f"mixture, seed {seed}, block from {block}".encode()).digest()
            key = int.from_bytes(digest[:8], "little")
            names = [name for name, n in phase.counts for _ in range(n)]
            order = sorted(range(BLOCK), key=lambda place: splitmix(key + place))
            for place in order[: end - block]:
                yield names[place], seen[names[place]]
                seen[names[place]] += 1


def splitmix(x: int) -> int:
    x = x * 0x9E3779B97F4A7C15 & MASK
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & MASK
    x = (x ^ x >> 27) * 0x94D049BB133111EB & MASK
    return x ^ x >> 31


def make(folder: Path, first: int, windows: int, heldout: int = 0) -> Dataset:
    """A dataset whose window n holds the token first + n."""
    folder.mkdir(parents=True)
    rows = (first + np.arange(windows)[:, None] + np.zeros(CONTEXT + 1, int)).astype(np.uint16)
    splits = {"train": rows} | ({"valid": rows[:heldout]} if heldout else {})
    packing.write_splits(folder, CONTEXT, splits)
    record = {"name": "random", "sha256": "0" * 64, "vocab_size": VOCAB}
    listed = [Split(name, 1, 10, len(those) * CONTEXT + 1, len(those)) for name, those in splits.items()]
    return write_manifest(folder, CONTEXT, record, listed, dropped={}, sources=[])


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> dict[str, Dataset]:
    folder, starts = tmp_path_factory.mktemp("sources"), itertools.accumulate(SIZES.values(), initial=0)
    return {
        name: make(folder / name, start, n, heldout=3)
        for (name, n), start in zip(SIZES.items(), starts, strict=False)
    }


@pytest.fixture(autouse=True)
def opened_once(monkeypatch) -> None:
    """Opening takes most of a small test's time."""
    opened = {}

    def open_once(dataset: Dataset, split: str) -> Windows:
        key = dataset.path, split
        if key not in opened:
            opened[key] = open_windows(dataset, split)
        return opened[key]

    monkeypatch.setattr(module, "open_windows", open_once)


@pytest.fixture
def mixture(sources) -> Mixture:
    return Mixture(sources, PHASES)


def test_100_000_windows_are_those_counted_one_by_one(mixture):
    expected = list(itertools.islice(brute_force(PHASES, 3), 100_000))
    assert [mixture.place(index, 3) for index in range(100_000)] == expected
    for phase, end in zip(PHASES, (50_400, 73_300, 90_000, 100_000), strict=True):
        for block in range(phase.first, end - BLOCK + 1, BLOCK):  # every whole block, exactly
            assert Counter(name for name, _ in expected[block : block + BLOCK]) == dict(phase.counts)
    for index in (0, 1, 12_345, 50_400, 50_401, 80_000, 99_999):
        counted = Counter(name for name, _ in expected[:index])
        assert mixture.read_before(index, 3) == {name: counted[name] for name in SIZES}
    for name, n in SIZES.items():
        used_up = next(i for i, place in enumerate(expected) if place == (name, n - 1)) + 1
        assert mixture.used_up(name, 3, 100_000) == used_up
        assert mixture.used_up(name, 3, used_up) is None


def test_sources_are_spread_evenly_in_a_block(mixture):
    """Of 128 neighbours of 4,000 (2,800 of wiki) the number from wiki is hypergeometric."""
    names = np.array([mixture.place(index, 0)[0] == "wiki" for index in range(24_000)])
    found = names[: 187 * 128].reshape(-1, 128).sum(axis=1)
    spread = np.sqrt(128 * 0.7 * 0.3 * (4000 - 128) / 3999)
    assert abs(found.mean() - 0.7 * 128) < 0.4  # of six blocks, but for 64 windows at their end
    # The standard deviation of 187 draws is known to 1 / sqrt(2 * 187) = 5.2%; 20% is four times that.
    assert 0.8 < found.std() / spread < 1.2


def test_order_is_the_one_of_earlier_versions(mixture):
    # Written down once: a run that is resumed after an upgrade must go on in the same order.
    places = [mixture.place(index, 0) for index in (0, 1, 2, 3, 4000, 50_401, 99_999)]
    assert places == ORDER


ORDER = [
    ('wiki', 0), ('wiki', 1), ('books', 0), ('wiki', 2), ('wiki', 2800), ('books', 15087), ('wiki', 52131)
]  # fmt: skip


def take(data: Mixture, n: int, **options) -> list:
    batches = train_batches(data, **({"seed": 3, "batch": 8, "vocab_size": VOCAB} | options))
    taken = list(itertools.islice(batches, n))
    batches.close()
    return taken


SHORT = (Phase(0, PHASES[0].counts), Phase(50, PHASES[1].counts), Phase(85, PHASES[2].counts))


def expected_records(phases: tuple[Phase, ...], n: int, seed: int = 3) -> list[str]:
    """Every source in its own epochs, the ones of a run that reads it alone."""
    places = itertools.islice(brute_force(phases, seed), n)
    return [f"{name}:{record_at(place, SIZES[name], seed)}" for name, place in places]


def test_batches_are_a_function_of_seed_and_index(sources):
    mixture, expected = Mixture(sources, SHORT), expected_records(SHORT, 140)
    starts = dict(zip(SIZES, itertools.accumulate(SIZES.values(), initial=0), strict=False))
    for batch, hosts in ((5, 1), (8, 2), (20, 4)):
        n = batch // hosts
        for start in (0, 40 // batch * batch):  # killed there and resumed
            parts = [
                take(mixture, (120 - start) // batch, batch=batch, start=start, rows=slice(h * n, h * n + n))
                for h in range(hosts)
            ]
            for of_hosts in zip(*parts, strict=True):
                records = np.concatenate([part.records for part in of_hosts]).tolist()
                first = of_hosts[0].first
                assert records == expected[first : first + batch]
                for part in of_hosts:  # the rows are what they are called
                    told = [record.split(":") for record in part.records.tolist()]
                    assert part.tokens[:, 0].tolist() == [starts[s] + int(n) for s, n in told]
    assert [record_of(mixture, index, 3) for index in range(0, 140, 13)] == expected[::13]


def test_what_comes_does_not_depend_on_later_phases(mixture):
    for n in range(1, len(PHASES)):
        shorter, end = Mixture(mixture.sources, PHASES[:n]), PHASES[n].first
        for index in (0, 1, end - 4321, end - 1):
            assert shorter.place(index, 0) == mixture.place(index, 0)


@pytest.mark.slow
def test_counts_over_100_000_windows_by_the_loader_itself(mixture, monkeypatch):
    """By 1 to 8 hosts, in three batch sizes, killed and resumed; two lengths: core/run/test_data.py."""
    expected = list(itertools.islice(brute_force(PHASES, 3), 100_800))
    assert [mixture.place(index, 3) for index in range(100_800)] == expected
    nothing, good = np.zeros((1, CONTEXT + 1), np.uint16), np.zeros(1, bool)
    monkeypatch.setattr(module, "_read", lambda windows, found, *_: (nothing, good))
    monkeypatch.setattr(module, "_locate", lambda mixture, index, seed: expected[index])  # types are checked
    labels = [f"{name}:{place}" for name, place in expected]
    for batch, hosts in ((700, 1), (3360, 1), *((8400, hosts) for hosts in range(1, 9))):
        killed = 50_000 // batch
        for host in range(hosts):
            rows = slice(host * batch // hosts, (host + 1) * batch // hosts)
            read = take(mixture, killed, batch=batch, rows=rows)
            read += take(mixture, 100_800 // batch - killed, batch=batch, rows=rows, start=killed * batch)
            assert len(read) == 100_800 // batch
            for one in read:
                assert one.records.tolist() == labels[one.first : one.first + batch][rows]


@pytest.mark.parametrize("counts", [(("wiki", BLOCK),), PHASES[0].counts])
def test_a_run_that_became_a_mixture_counts_from_there(sources, counts):
    mixture = Mixture({name: sources[name] for name, _ in counts}, (Phase(50, counts),))
    expected = list(itertools.islice(brute_force(mixture.phases, 3), BLOCK + 9))
    assert [mixture.place(50 + i, 3) for i in range(BLOCK + 9)] == expected
    with pytest.raises(UserError, match="sequence 49 was read before its data became a mixture"):
        mixture.place(49, 3)


def test_phases_in_words():
    phases = (Phase(0, (("a", 3000), ("b", 1000))), Phase(1500, (("b", 4000),)))
    assert describe_phases(phases) == "a 75%, b 25%; from sequence 1,500 on b 100%"
    assert describe_phases(phases[1:], 2000) == "from sequence 1,500 of 2,000 on b 100%"


def test_a_source_that_is_no_longer_named_is_named_where_it_comes(sources):
    without = Mixture({name: sources[name] for name in ("books", "wiki")}, SHORT)
    before = [record_of(without, index, 3) for index in range(85)]
    assert before == expected_records(SHORT, 85) and not any(name.startswith("code:") for name in before)
    with pytest.raises(
        UserError, match="sequence 85 is of the source code, which --data does not name any more"
    ):
        record_of(without, 85, 3)


def test_one_source_by_name_reads_as_it_does_without_one(sources):
    named = Mixture({"wiki": sources["wiki"]}, (Phase(0, (("wiki", BLOCK),)),))
    for one, other in zip(take(named, 30), take(sources["wiki"], 30), strict=True):
        assert (one.tokens == other.tokens).all()
        assert one.records.tolist() == [f"wiki:{record}" for record in other.records.tolist()]


def test_records_are_left_out_and_damaged_ones_named_by_source(sources, tmp_path):
    mixture = Mixture(sources, SHORT)
    for batch in take(mixture, 20, leave_out=("wiki:5", "books:7")):
        assert (batch.bad == np.isin(batch.records, ["wiki:5", "books:7"])).all()
    require_records(mixture, ("wiki:102", "books:0"), "--leave-out")
    for record, why in (
        ("wiki:103", r"the training records of .*wiki are 0 to 102"),
        (5, "no such record; the first one is books:0"),
        ("news:5", "no such record"),
    ):
        with pytest.raises(UserError, match=f"^--leave-out {record}: .*{why}"):
            require_records(mixture, (record,), "--leave-out")
    with pytest.raises(UserError, match=r"^--leave-out wiki:5: .* no such record; the first one is 0$"):
        require_records(sources["wiki"], ("wiki:5",), "--leave-out")

    damaged = make(tmp_path / "damaged", 0, 40)
    file = next(damaged.path.glob("windows-train*"))
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    broken = Mixture({**sources, "books": damaged}, SHORT)
    with pytest.raises(UserError, match=rf"train record \d+ in {file} cannot be read"):
        take(broken, 20)
    for batch in take(broken, 10, on_bad="skip"):
        assert batch.bad.any() and all(name.startswith("books:") for name in batch.records[batch.bad])


def test_a_mixture_is_recorded_and_has_every_sources_heldout_splits(mixture, sources):
    record = {"mixture": mixture.record()}
    assert phases_of(record) == PHASES and phases_of({}) == ()
    assert [phase_number(record, n) for n in (0, 1, 50_400, 50_401, 99_999)] == [0, 1, 1, 2, 4]
    assert mixture.heldout == ["books/valid", "code/valid", "wiki/valid"]
    assert mixture.splits["train"].windows == sum(SIZES.values())
    for name, source in sources.items():
        for own, there in zip(
            heldout_windows(mixture, f"{name}/valid"), heldout_windows(source, "valid"), strict=True
        ):
            assert (own == there).all()
    with pytest.raises(UserError, match="no split 'valid': it has train, books/valid"):
        heldout_windows(mixture, "valid")
    others = (Mixture(sources, PHASES[:3]), Mixture({**sources, "wiki": sources["code"]}, PHASES))
    assert len({mixture.fingerprint, *(other.fingerprint for other in others)}) == 3


def test_what_data_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert parse_data("builtin") == parse_data(("builtin",)) == "builtin"
    assert parse_data("hf:OWNER/NAME") == "hf:OWNER/NAME"
    assert parse_data("data/year=2020/*.txt") == "data/year=2020/*.txt"
    assert parse_data(("wiki=a b", "books=hf:X/Y")) == {"books": "hf:X/Y", "wiki": "a b"}
    assert parse_data("wiki=a") == {"wiki": "a"}
    Path("wiki=a").mkdir()
    assert parse_data("wiki=a") == "wiki=a"  # what is there is meant


def test_weights_become_windows_of_a_block():
    def counts(*weights: str) -> dict[str, int]:
        asked = parse_mixture([f"{w.split('=')[0]}=x" for w in weights], weights, ())
        return dict(asked.shares[0][1])

    assert counts("wiki=0.7", "books=0.3") == counts("books=3", "wiki=7") == {"books": 1200, "wiki": 2800}
    assert counts("a=1", "b=1", "c=1") == {"a": 1334, "b": 1333, "c": 1333}
    assert counts("a=1e-3", "b=1") == {"a": 4, "b": 3996}
    assert parse_mixture("wiki=x", (), ()).shares == ((0.0, (("wiki", 4000),)),)
    assert parse_mixture("x", (), ()) is None
    words = ("0.8", "books=1", "wiki=1", "0.9", "books=1")
    shares = parse_mixture(("wiki=x", "books=y"), ("wiki=1",), words).shares
    assert [(share, dict(counts)) for share, counts in shares] == [
        (0.0, {"wiki": 4000}),
        (0.8, {"books": 2000, "wiki": 2000}),
        (0.9, {"books": 4000}),
    ]


DATA, WEIGHTS = ("wiki=x", "books=y"), ("wiki=0.7", "books=0.3")


@pytest.mark.parametrize(
    ("data", "weights", "phases", "why"),
    [
        (DATA, ("wiki=0.7", "news=0.3"), (), "--weights news=0.3: --data has no source 'news', but b"),
        (DATA, (), (), r"give their shares, as in --weights books=1 wiki=1"),
        (DATA, ("wiki=1",), (), "--data names books, but neither --weights nor --phases gives it a share"),
        (DATA, ("wiki=0.7", "wiki=0.3"), (), "--weights gives wiki twice"),
        (DATA, ("wiki=1", "books=0"), (), "--weights books=0: a weight must be positive"),
        (DATA, ("wiki=1", "books=-1"), (), "--weights books=-1: a weight must be positive"),
        (DATA, ("wiki=nan", "books=1"), (), "--weights wiki=nan: a weight must be positive"),
        (DATA, ("wiki=inf", "books=1"), (), "--weights wiki=inf: a weight must be positive"),
        (DATA, ("wiki=some", "books=1"), (), "--weights wiki: 'some' is not a number"),
        (DATA, ("wiki", "books=1"), (), "--weights wiki: '' is not a number"),
        (DATA, ("wiki=1", "books=1e-9"), (), "is a share of 1e-09, less than one window in"),
        (DATA, WEIGHTS, ("1.2", "books=1"), r"--phases is 1.2; it must lie in \(0, 1\)"),
        (DATA, WEIGHTS, ("-0.2", "books=1"), r"--phases is -0.2; it must lie in \(0, 1\)"),
        (DATA, WEIGHTS, ("nan", "books=1"), r"--phases is nan; it must lie in \(0, 1\)"),
        (DATA, WEIGHTS, ("0.8", "books=1", "0.5", "wiki=1"), "0.5 comes after 0.8; give"),
        (DATA, WEIGHTS, ("0.8", "books=1", "0.8", "wiki=1"), "give phases in their order"),
        (DATA, WEIGHTS, ("books=1",), "--phases begins with books=1: give first which part"),
        (DATA, WEIGHTS, ("0.8",), "--phases 0.8 needs weights, as in books=1 wiki=1"),
        (DATA, WEIGHTS, ("half", "books=1"), "--phases: 'half' is not a number"),
        (DATA, WEIGHTS, ("0.8", "news=1"), "'news', but books, wiki; give --phases 0.8 for"),
        (("wiki=x", "wiki=y"), WEIGHTS, (), "--data names two sources 'wiki'"),
        (("wiki=x", "y"), WEIGHTS, (), "--data y: of several sources each needs a name, as in wiki=y"),
        ((), (), (), "--data needs a value"),
        ("x", ("wiki=1",), (), "--weights is for several sources"),
        ("x", (), ("0.5", "wiki=1"), "--phases is for several sources"),
    ],
)  # fmt: skip
def test_a_mixture_that_cannot_be_is_refused(data, weights, phases, why):
    with pytest.raises(UserError, match=why):
        parse_mixture(data, weights, phases)
