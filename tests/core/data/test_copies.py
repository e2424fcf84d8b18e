import numpy as np
import pytest

from core.data.copies import Copies, Seen


def hashes(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 2**64, n, np.uint64)


def test_copies_are_counted_however_they_come():
    drawn = np.random.default_rng(1).choice(hashes(300), 1000)
    expected = 1000 - len(set(drawn.tolist()))
    for cuts in ([], [1, 2, 500], range(0, 1000, 7)):
        copies = Copies(limit=300)
        for part in np.split(drawn, cuts):
            copies.add(part)
        assert copies.is_exact and copies.count() == expected
    assert copies.among(hashes(400)[200:]) == len(set(hashes(300)[200:].tolist()) & set(drawn.tolist()))


@pytest.mark.parametrize("cuts", [[], range(0, 60_000, 997)])
def test_beyond_the_limit_the_count_is_an_estimate(cuts):
    """30,000 documents, each twice, where 1,000 hashes are held: at the end a document in 32 or 64 is looked
    at. The standard deviation of the count is at most sqrt(30,000 x 64) = 1,386 (each copy counts for at most
    64, of a 64th of the documents); four of them are 5,543."""
    drawn = np.random.default_rng(2).permutation(np.repeat(hashes(30_000), 2))
    copies = Copies(limit=1000)
    for part in np.split(drawn, cuts):
        copies.add(part)
        assert len(copies._seen) <= 1000
    assert not copies.is_exact
    assert abs(copies.count() - 30_000) < 5543
    whole = Copies(limit=1000)
    whole.add(drawn)
    assert whole.count() == copies.count()


@pytest.mark.parametrize("cuts", [[], [1, 1, 2, 500], range(0, 1000, 7), range(1000)])
def test_what_was_seen_is_known(cuts):
    drawn = np.random.default_rng(3).choice(hashes(300), 1000)
    before, expected = set(), []
    for one in drawn.tolist():
        expected.append(one not in before)
        before.add(one)
    seen = Seen()
    found = np.concatenate([seen.add(part) for part in np.split(drawn, cuts)])
    assert found.tolist() == expected
    assert sum(map(len, seen._sorted)) == len(before)
    assert len(seen._sorted) <= 9  # each at most half of the one before it: 300 are in at most log2(300) + 1
