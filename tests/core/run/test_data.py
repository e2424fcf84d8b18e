"""From which sequence on which mixture holds, in new runs and in those that resume; nothing is trained."""

import dataclasses
import json
from pathlib import Path

import pytest

from core.checkpoint.manifest import Manifest, digest
from core.checkpoint.steps import step_path
from core.data.dataset import Dataset, Split, fingerprint_of
from core.data.mixture import Mixture, Phase, phases_of
from core.data.mixture_options import parse_mixture
from core.data.prepare import append, prepare
from core.errors import UserError
from core.run import data as run_data
from core.run.data import (
    choose_run_tokenizer,
    data_rows,
    find_phases,
    open_data,
    open_recorded_data,
    trained_before,
)
from core.run.folder import check_run_folder, run_record, write_config
from core.run.log import RunLog
from core.run.presets import Trained, count_steps
from core.run.settings import model_config
from tests.core.data.test_mixture import make
from tests.core.data.test_prepare import documents, write_jsonl
from train_tpu.config import RunConfig, defaults

BATCH = 16
TOKENIZER = {"name": "bytes", "sha256": "0" * 64, "vocab_size": 258}
WIKI, HALF, BOOKS = (("books", 1200), ("wiki", 2800)), (("books", 2000), ("wiki", 2000)), (("books", 4000),)


def source(fingerprint: str, windows: int = 900) -> Dataset:
    """A dataset without its files."""
    split = Split("train", 2, windows * 16, windows * 16 + 1, windows)
    return Dataset(
        path=Path(), context=16, tokenizer_record=TOKENIZER, fingerprint=fingerprint, splits={"train": split},
        files={}, sources=[], sealed=True,
    )  # fmt: skip


def settings(**changes) -> RunConfig:
    mixed = {"data": ("wiki=w", "books=b"), "weights": ("wiki=0.7", "books=0.3"), "steps": 1000}
    run = defaults("mtlm1-tiny")
    run = dataclasses.replace(run, optim=dataclasses.replace(run.optim, lr=1e-2))
    return dataclasses.replace(run, **(mixed | {"phases": ("0.8", "books=1")} | changes))


def start(folder: Path, at: int | None = None, hashes: dict | None = None, **changes) -> tuple[Phase, ...]:
    """The phases of a start in `folder`, which is then at step `at`; as a user's command would, it is refused
    without --allow-change."""
    config, hashes = settings(**changes), {"books": "b", "wiki": "w"} | (hashes or {})
    asked = parse_mixture(config.data, config.weights, config.phases)
    if asked is None:
        data = {"fingerprint": hashes[config.data]}
    else:
        sources = {name: source(hashes[name]) for name in asked.sources}
        mixture = Mixture(sources, find_phases(config, asked, sources, folder))
        data = {"fingerprint": mixture.fingerprint, "mixture": mixture.record()}
    record = run_record(config, model_config(config, 258), config.steps, TOKENIZER, data)
    check_run_folder(folder, record, config.allow_change, RunConfig())
    folder.mkdir(exist_ok=True)
    write_config(folder, record)
    if at is not None:
        manifest = Manifest(
            kind="train", step=at, sequences=at * BATCH, tokens=0, tokenizer=TOKENIZER,
            config={name: record[name] for name in ("model", "run")}, data={**data, "cursor": at * BATCH},
        )  # fmt: skip
        where = step_path(folder / "checkpoints", at)
        where.mkdir(parents=True)
        (where / "manifest.json").write_text(manifest.to_json())
    return phases_of(data)


FIRST = (Phase(0, WIKI), Phase(800 * BATCH, BOOKS))


def test_a_phase_is_fixed_once_whatever_the_length_later(tmp_path):
    assert start(tmp_path / "run", at=100) == FIRST
    assert start(tmp_path / "run") == FIRST
    longer = {"steps": 5000, "batch": 64}
    assert start(tmp_path / "run", allow_change=("steps", "batch"), **longer) == FIRST
    # The same mixture in other words.
    again = longer | {"data": ("books=moved/b", "wiki=w"), "weights": ("books=3", "wiki=7")}
    assert start(tmp_path / "run", phases=(".80", "books=5"), **again) == FIRST


def test_a_changed_mixture_is_asked_for_by_name_and_begins_at_the_next_sequence(tmp_path):
    folder, change = tmp_path / "run", {"weights": ("wiki=1", "books=1")}
    start(folder, at=100)
    with pytest.raises(UserError, match=r"the mixture books 30%, wiki 70%; from .*--allow-change mixture"):
        start(folder, **change)
    allowed = {"allow_change": ("mixture",)}
    assert start(folder, **allowed, **change) == (FIRST[0], Phase(1600, HALF), FIRST[1])
    assert start(folder, at=200, **change) == (FIRST[0], Phase(1600, HALF), FIRST[1])  # from now on silently
    changed = start(folder, phases=("0.5", "books=1"), **allowed, **change)
    assert changed == (FIRST[0], Phase(1600, HALF), Phase(500 * BATCH, BOOKS))
    # Back, from an older step: what followed is dropped, and no phase begins where nothing changes.
    assert start(folder, from_step=100, **allowed) == FIRST
    with pytest.raises(UserError, match="--fallback may resume from an older step"):
        start(folder, fallback=True, **allowed, **change)


@pytest.mark.parametrize("at", [800, 900])
def test_a_change_of_what_has_been_trained_is_refused(tmp_path, at):
    """At the phase's own beginning, and behind it: weights of the phase before would change nothing."""
    start(tmp_path / "run", at=at)
    allowed = {"allow_change": ("mixture",)}
    with pytest.raises(UserError, match=rf"only before update {at}, which .* \(books 100%\): leave them"):
        start(tmp_path / "run", weights=("wiki=1", "books=1"), **allowed)
    back = start(tmp_path / "run", weights=("wiki=1", "books=1"), phases=(), **allowed)
    assert back[-1] == Phase(at * BATCH, HALF)


def test_sources_come_and_go(tmp_path):
    folder, allowed = tmp_path / "run", {"allow_change": ("mixture",)}
    start(folder, at=100, phases=())
    more = {"data": ("wiki=w", "books=b", "code=c"), "weights": ("code=1",), "hashes": {"code": "c"}}
    more |= {"phases": ("0.5", "wiki=1", "books=1")}
    with pytest.raises(UserError, match="--allow-change mixture"):
        start(folder, **more)
    code = (FIRST[0], Phase(1600, (("code", 4000),)), Phase(8000, HALF))
    assert start(folder, at=200, **more, **allowed) == code
    left = {"data": ("wiki=w",), "weights": (), "phases": ()}
    assert start(folder, **left, **allowed) == (*code[:2], Phase(3200, (("wiki", 4000),)))


def test_data_without_a_name_gets_one(tmp_path):
    folder = tmp_path / "run"
    start(folder, at=100, data="wiki", weights=(), phases=(), hashes={"wiki": "w"})
    with pytest.raises(UserError, match="with the mixture wiki alone, not wiki 100%; from sequence 1,600 on"):
        start(folder)
    expected = (Phase(0, (("wiki", 4000),)), Phase(1600, WIKI), FIRST[1])
    assert start(folder, allow_change=("mixture",)) == expected  # no window of wiki is read again
    # Other data: nothing is known of what was read before.
    folder = tmp_path / "other"
    start(folder, at=100, data="news", weights=(), phases=(), hashes={"news": "n"})
    with pytest.raises(UserError, match="--allow-change data"):
        start(folder, allow_change=("mixture",))
    assert start(folder, allow_change=("mixture", "data")) == (Phase(1600, WIKI), FIRST[1])


def test_a_source_that_has_changed_is_other_data(tmp_path):
    start(tmp_path / "run", at=100)
    changed = {"hashes": {"books": "d" * 64}}
    with pytest.raises(UserError, match=r"not wiki=w books=b \(d{12}\), whose source books is another"):
        start(tmp_path / "run", allow_change=("mixture",), **changed)
    assert start(tmp_path / "run", allow_change=("data",), **changed) == FIRST
    with pytest.raises(UserError, match="--allow-change data"):  # a mixture no more
        start(tmp_path / "run", data="wiki", weights=(), phases=())


def test_a_phase_that_is_too_short_is_refused(tmp_path):
    for phases in (("0.0001", "books=1"), ("0.9999", "books=1"), ("0.5", "books=1", "0.5001", "wiki=1")):
        with pytest.raises(UserError, match=r"would begin at update (0|1000|500) of 1000"):
            start(tmp_path / "run", phases=phases)


def test_epochs_are_said_beforehand():
    sources = {"books": source("b", 900), "wiki": source("w", 100_000)}
    rows = dict(data_rows(settings(), Mixture(sources, FIRST), 16_000))
    assert rows["data"].startswith("2 sources: 1,614,402 tokens in 4 documents")
    # 12,800 x 0.3 + 3,200 windows of books, but for the order in the last block before the phase; 900 are 0.3
    # of 3,000.
    epochs, used_up = rows["  books"].split("; ")[1].split(" epochs, used up at sequence ")
    assert abs(float(epochs) - 7040 / 900) < 0.05 and used_up.endswith(" and then read again")
    assert abs(int(used_up.split()[0].replace(",", "")) - 3000) < 200
    assert rows["  wiki"].endswith("; 0.09 epochs")
    assert rows["mixture"] == "books 30%, wiki 70%; from sequence 12,800 of 16,000 on books 100%"


def test_what_was_read_with_another_batch_counts_as_it_was(tmp_path):
    # 100 updates of 16 in the folder: 1,600 of 9,600 windows. From there on 64 at a time.
    assert start(tmp_path / "run", at=100) == FIRST
    config = settings(batch=64, steps=None, epochs=1.0)
    before = trained_before(config, tmp_path / "run")
    assert before == Trained(step=100, sequences=1600)
    windows = Mixture({"wiki": source("w", 9_600)}, (Phase(0, (("wiki", 4000),)),))
    assert count_steps(config, windows, before) == 100 + (9_600 - 1_600) // 64
    assert before.sequences_at(225, 64) == 1_600 + 125 * 64
    assert before.describe(225, 64, 8) == "225 steps, from 100 on of 64 x 8, in all 76,800"
    # With the batch of before, and for a run that begins, it is a product.
    assert before.describe(225, 16, 8) == Trained().describe(225, 16, 8) == "225 steps of 16 x 8 = 28,800"
    assert trained_before(config, tmp_path / "new") == Trained()
    # Of the checkpoint that is asked for, not the newest.
    earlier = dataclasses.replace(config, from_step=100)
    start(tmp_path / "run", at=200)
    assert trained_before(config, tmp_path / "run").step == 200
    assert trained_before(earlier, tmp_path / "run") == before


def test_sources_of_the_same_text_are_said_if_one_holds_some_out():
    def row(wiki: list[str], books: list[str], *heldout: str) -> str | None:
        made = {
            name: dataclasses.replace(data, sources=files)
            for name, data, files in (("books", source("b"), books), ("wiki", source("w"), wiki))
        }
        splits = dict.fromkeys(("train", *heldout), made["wiki"].splits["train"])
        made["wiki"] = dataclasses.replace(made["wiki"], splits=splits)
        return dict(data_rows(settings(), Mixture(made, FIRST), 16_000)).get("same text")

    said = row(["a.txt", "b.txt"], ["c.txt", "b.txt"], "valid")
    assert said.startswith(
        "books and wiki were both made of b.txt: what one holds out may train in the other"
    )
    assert "made of b.txt and 1 more: what" in row(["c.txt", "b.txt"], ["b.txt", "c.txt"], "valid")
    assert row(["a.txt"], ["b.txt"], "valid") is None
    assert row(["a.txt"], ["a.txt"]) is None  # nothing is held out


def test_sources_that_do_not_go_together_are_refused(tmp_path, monkeypatch):
    wiki, books = (make(tmp_path / name, 0, 40) for name in ("wiki", "books"))
    config = settings(data=(f"wiki={wiki.path}", f"books={books.path}"))
    content = (books.path / "dataset.json").read_text()

    def change(old: str, new: str) -> None:
        changed = json.loads(content.replace(old, new))
        del changed["sha256"]
        changed["fingerprint"] = fingerprint_of(changed)
        changed["sha256"] = digest(changed)
        (books.path / "dataset.json").write_text(json.dumps(changed))

    change('"vocab_size": 500', '"vocab_size": 400')
    with pytest.raises(UserError, match=r"tokenizers differ: the source books has .*, the source wiki has"):
        choose_run_tokenizer(config, "bytes")
    change('"context": 8', '"context": 16')
    with pytest.raises(UserError, match="books was prepared for a context of 16 and wiki for 8: prepare"):
        choose_run_tokenizer(config, "bytes")
    nothing = source("n", 0)
    monkeypatch.setattr("core.run.data.open_or_prepare", lambda *_: nothing)
    with pytest.raises(UserError, match=r"the source books: the text of .* does not fill one window of 8"):
        open_data(config, "bytes", 8, tmp_path / "run")


@pytest.mark.parametrize("mixed", [False, True])
def test_a_run_keeps_the_version_that_it_began_on(tmp_path, monkeypatch, capsys, mixed):
    monkeypatch.setattr(run_data, "CACHE", tmp_path / "cache")
    text = write_jsonl(tmp_path / "t.jsonl", documents(60))
    out = prepare([text], tmp_path / "data", "bytes", 32, valid_fraction=0)
    data, weights = (f"a={out}", ("a=1",)) if mixed else (str(out), ())
    config = settings(data=(data,) if mixed else data, weights=weights, phases=(), steps=10)

    def opened(folder: Path, **changes) -> str:
        found = open_data(dataclasses.replace(config, **changes), "bytes", 32, folder)
        return (found.sources["a"] if mixed else found).fingerprint

    first = opened(tmp_path / "run")
    assert "version" not in capsys.readouterr().out
    record = {"fingerprint": first} if not mixed else {
        "fingerprint": "of the mixture", "mixture": {"sources": {"a": first}, "phases": []},
    }  # fmt: skip
    (tmp_path / "run").mkdir()
    write_config(tmp_path / "run", run_record(config, model_config(config, 258), 10, TOKENIZER, record))
    append([write_jsonl(tmp_path / "new.jsonl", documents(40, seed=2))], out)
    capsys.readouterr()
    newest = opened(tmp_path / "run")  # no update was made: the run has not begun
    assert newest != first and "version 2 of 2" in capsys.readouterr().out
    RunLog(tmp_path / "run", 0).write(0, "train", tokens=0, loss=1.0, nll=1.0)
    assert opened(tmp_path / "run") == first
    assert f"data {out}: version 1 of 2, {first[:12]}, with which this run began" in capsys.readouterr().out
    assert opened(tmp_path / "another") == newest and "version 2 of 2" in capsys.readouterr().out
    assert opened(tmp_path / "run", allow_change=("data",)) == newest


def test_a_run_on_one_source_without_a_name_is_given_it_without_one():
    with pytest.raises(UserError, match=r"without a name: give it so, --data text/here$"):
        open_recorded_data(("wiki=text/here",), {"fingerprint": "f"}, "bytes", 8)
