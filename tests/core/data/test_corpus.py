import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from core.data import corpus

ALL_FILES = corpus._files


def texts() -> list[str]:
    return [text for text, _ in corpus.documents()]


@pytest.fixture(scope="module")
def harvested() -> list[str]:
    """A part of the corpus, of some files of NumPy and Optax: all of it takes half a minute."""
    with pytest.MonkeyPatch.context() as patch:
        roots = [Path(importlib.util.find_spec(name).origin).parent for name in ("numpy", "optax")]
        files = tuple(p for root in roots for p in sorted(root.rglob("*.py"))[::4] if corpus._wanted(p, root))
        patch.setattr(corpus, "_files", lambda: files)
        yield texts()


def assert_is_prose(documents: list[str]) -> None:
    joined = "\n".join(documents)
    # English running text is about 4/5 letters; code, tables and markup are well below.
    assert sum(c.isalpha() for c in joined) / len(joined) > 0.75
    assert "\n>>>" not in joined
    assert joined.count(" the ") / len(joined.split()) > 0.03  # in English prose about 6%
    assert len(set(documents)) == len(documents)
    assert min(map(len, documents)) >= corpus.SHORTEST


def test_it_is_prose_without_repetitions(harvested):
    assert len(harvested) > 80
    assert_is_prose(harvested)
    assert not any("Licensed under the Apache" in d for d in harvested)


def test_nothing_is_imported_for_its_docstrings():
    script = (
        "import sys; from core.data import corpus; before = set(sys.modules); next(corpus.documents());"
        "print(sorted(name for name in set(sys.modules) - before if name.split('.')[0] in corpus.PACKAGES))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_order_is_fixed(harvested):
    corpus._harvest.cache_clear()
    assert texts() == harvested
    positions = [position for _, position in corpus.documents()]
    assert positions == sorted(positions)
    assert positions[-1] <= corpus.n_files()


def test_clean():
    prose = "This sentence explains what the function does, in words that everyone can read and enjoy. " * 3
    assert corpus.clean("Too short to keep.") == ""
    assert corpus.clean("Licensed under the Apache License. " + prose) == ""
    text = f"""{prose}

    >>> f(1)
    2

    Args:
      x: a number, which is the one thing that it takes and uses.

    =====  =====
    a      b
    =====  =====

    It calls :func:`jax.jit` and ``numpy`` on the way, and then it returns.
    """
    cleaned = corpus.clean(text)
    assert cleaned == prose.strip() + "\n\nIt calls jax.jit and numpy on the way, and then it returns."
    # Mostly code: nothing stays.
    assert corpus.clean(prose + "\n\n" + "    x = y[0] + 1; z(x)\n" * 60) == ""


@pytest.mark.slow
def test_the_whole_corpus_is_several_megabytes(monkeypatch):
    monkeypatch.setattr(corpus, "_files", ALL_FILES)
    documents = texts()
    assert sum(map(len, documents)) > 3_000_000
    assert_is_prose(documents)
