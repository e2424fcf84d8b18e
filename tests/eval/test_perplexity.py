"""The perplexities of a text against Hugging Face's own loop over the exported folder, and by hand."""

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from core.errors import UserError
from eval import perplexity
from eval.perplexity import disjoint_rows, score_text, stride_rows
from tests.eval.conftest import Made
from tests.eval.small_sets import Sets
from tests.eval.test_formulas import Reference
from tests.port_torch.trained import transformers_model

RELATIVE = 1e-5  # of a sum over some thousand tokens, each off by 1e-5 or less of some nats


@pytest.fixture(scope="module")
def text(sets: Sets) -> str:
    return sets.pages[3].detokenised  # of several contexts


@pytest.fixture(scope="module")
def theirs(made: Made) -> torch.nn.Module:
    return transformers_model(made.folder)


def guide(model: torch.nn.Module, ids: torch.Tensor, max_length: int, stride: int) -> tuple[float, int]:
    """(nats, tokens) by the loop of https://huggingface.co/docs/transformers/perplexity.

    Of a window's labels it takes one off for the shift; there is one to take off only where the first of them
    counts, in the first window. Here those are counted that the loss is over.
    """
    nats, n_tokens, previous_end = 0.0, 0, 0
    for begin in range(0, len(ids), stride):
        end = min(begin + max_length, len(ids))
        inputs = ids[None, begin:end]
        labels = inputs.clone()
        labels[:, : -(end - previous_end)] = -100
        with torch.inference_mode():
            logits = model(inputs).logits.double()
        shifted = labels[0, 1:]
        nats += float(torch.nn.functional.cross_entropy(logits[0, :-1], shifted, reduction="sum"))
        n_tokens += int((shifted != -100).sum())
        previous_end = end
        if end == len(ids):
            break
    return nats, n_tokens


@pytest.mark.parametrize(("adapter", "stride"), [("flax", 160), ("torched", 160), ("torched", 57)])
def test_strides_are_hugging_face_s(adapter, stride, theirs, made, text, request):
    """Every token but the first once, whatever the stride."""
    backend = request.getfixturevalue(adapter).model.backend_model
    ids = [made.tokenizer.bos, *made.tokenizer.encode(text).tolist()]
    assert len(ids) > 2 * made.config.context
    nats, n_tokens = guide(theirs, torch.tensor(ids), made.config.context, stride)
    assert n_tokens == len(ids) - 1
    found = score_text(backend, list(stride_rows(ids, made.config.context, stride)), "")
    assert found.tokens == n_tokens
    assert found.nats == pytest.approx(nats, rel=RELATIVE)
    assert found.perplexity == pytest.approx(math.exp(nats / n_tokens), rel=20 * RELATIVE)


def test_disjoint_windows(torched, flax, theirs, made, text):
    """Side by side, each predicting the first token of the next; nothing sees across."""
    ids = [made.tokenizer.bos, *made.tokenizer.encode(text).tolist()]
    context, nats = made.config.context, 0.0
    for start in range(0, len(ids) - 1, context):
        window = torch.tensor([ids[start : start + context + 1]])
        with torch.inference_mode():
            logits = theirs(window[:, :-1]).logits.double()
        nats += float(torch.nn.functional.cross_entropy(logits[0], window[0, 1:], reduction="sum"))
    for evaluated in (torched, flax):
        found = score_text(evaluated.model.backend_model, list(disjoint_rows(ids, context)), "")
        assert found.tokens == len(ids) - 1
        assert found.nats == pytest.approx(nats, rel=RELATIVE)
        assert found.perplexity == pytest.approx(math.exp(nats / (len(ids) - 1)), rel=20 * RELATIVE)


@pytest.mark.parametrize("n", [2, 9, 10, 11, 12, 30, 31, 57])
def test_every_token_is_scored_once(n):
    """With as much before it as the windows leave, at every length around a border."""
    ids, context = list(range(n)), 10
    for rows, least in [(list(disjoint_rows(ids, context)), 1)] + [
        (list(stride_rows(ids, context, stride)), context - stride) for stride in (1, 4, 9)
    ]:
        scored = [target for row in rows for target in row.targets]
        assert scored == ids[1:]
        for row in rows:
            assert len(row.inputs) <= context
            inputs = np.array(row.inputs)
            assert (np.diff(inputs) == 1).all() and row.targets[-1] == inputs[-1] + 1
            for target in row.targets:
                assert target - inputs[0] >= min(target, least)


def test_the_command(made: Made, sets: Sets, text, tmp_path: Path, monkeypatch, capsys):
    """A text file: what is written and printed; words as one document; other texts stay in the file."""
    path = tmp_path / "some.txt"
    path.write_text(text, encoding="utf-8")
    other = tmp_path / "other.txt"
    other.write_text("Another text.", encoding="utf-8")
    renamed = tmp_path / "elsewhere/some.txt"
    renamed.parent.mkdir()
    renamed.write_text("A third text.", encoding="utf-8")
    for name in (other, renamed, path):
        arguments = ["--text", name, "--device", "cpu", "--out", tmp_path / "out", "--stride", "100"]
        monkeypatch.setattr("sys.argv", ["perplexity", str(made.folder), *map(str, arguments)])
        assert perplexity.main() == 0
    printed, said = capsys.readouterr()
    assert said.count("had the perplexities of another text named some.txt, which are replaced") == 1
    content = json.loads((tmp_path / "out/perplexity.json").read_text())
    assert list(content) == ["other.txt", "some.txt"]
    entry = content["some.txt"]
    for values in entry["perplexities"].values():
        assert values["bytes"] == len(text.encode())
        assert values["bits_per_byte"] == pytest.approx(values["nats"] / math.log(2) / len(text.encode()))
    assert entry["settings"] == {"dtype": "float32", "stride": 100, "context": made.config.context}
    reference = Reference(made)
    nats, bos = (-x for x in reference.document(text))
    word, n = entry["perplexities"]["word"], len(re.split(r"\s+", text))
    assert (word["words"], word["bytes"]) == (n, len(text.encode()))
    assert word["nats"] == pytest.approx(nats, rel=RELATIVE)
    assert word["perplexity"] == pytest.approx(math.exp(nats / n), rel=50 * RELATIVE)
    assert word["perplexity_without_bos"] == pytest.approx(math.exp((nats - bos) / n), rel=50 * RELATIVE)
    assert "; the text begins with bos, not scored" in printed
    for name, values in entry["perplexities"].items():
        assert re.search(
            rf"\| {name} \| {values['perplexity']:.3f} \| {values['bits_per_byte']:.4f} \|", printed
        )


def test_another_model_s_are_kept(made: Made, tmp_path: Path, monkeypatch):
    """As eval.run does: those of a text of the same name were replaced by another model's."""
    there = tmp_path / "perplexity.json"
    there.write_text(json.dumps({"a.txt": {"model": {"name": "other", "sha256": "0" * 64}}}))
    (tmp_path / "a.txt").write_text("a")
    monkeypatch.setattr(perplexity, "measure", lambda *_: pytest.fail("scored first"))
    arguments = ("--text", tmp_path / "a.txt", "--device", "cpu", "--out", tmp_path)
    monkeypatch.setattr("sys.argv", ["perplexity", str(made.folder), *map(str, arguments)])
    before = there.read_bytes()
    with pytest.raises(UserError, match=r"results of another model \(other, sha256 0+\): give another"):
        perplexity.main()
    assert there.read_bytes() == before


@pytest.mark.parametrize("content", [b"", b'{"a":', b'{"a": 1}', b"[]", b"null", b"\xff", None])
def test_what_could_not_be_kept_is_refused_before_anything_is_scored(
    made: Made, tmp_path: Path, monkeypatch, content: bytes | None
):
    """A damaged file of earlier figures, and a place in which no file can be."""
    text, there = tmp_path / "a.txt", tmp_path / "perplexity.json"
    text.write_text("a")
    there.write_bytes(content or b"")
    monkeypatch.setattr(perplexity, "measure", lambda *_: pytest.fail("scored first"))
    out, said = tmp_path, r"perplexity\.json cannot be read \(.*\): remove it and measure again"
    if content is None:
        out, said = there, "is a file: name another folder"
    arguments = ("--text", text, "--device", "cpu", "--out", out)
    monkeypatch.setattr("sys.argv", ["perplexity", str(made.folder), *map(str, arguments)])
    with pytest.raises(UserError, match=said):
        perplexity.main()
    assert there.read_bytes() == (content or b"")


def test_the_token_that_opens_a_text_is_named():
    """`<s>` is bos in few of the field's tokenizers; where there is none, eos stands before a text, and words
    have no score without bos."""
    values = {"perplexity": 2.0, "bits_per_byte": 1.0, "bytes": 3, "tokens": 3}
    words = {"perplexity": 2.0, "bits_per_byte": 1.0, "words": 1, "perplexity_without_bos": 1.5}
    found = {"token_disjoint": values, "word": words}
    with_bos, without = (perplexity.report("t", found, 8, 4, first) for first in ("bos", "eos"))
    assert (
        "; the text begins with bos, not scored" in with_bos and "word without scoring bos: 1.500" in with_bos
    )
    assert "; the text begins with eos, not scored" in without and "bos" not in without


def test_refusals(made: Made, sets: Sets, tmp_path: Path, monkeypatch):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "a.txt").write_text("a")
    text = ("--text", tmp_path / "a.txt", "--device", "cpu")
    for arguments, said in (
        ((*text, "--data-dir", tmp_path), "not both"),
        (("--text", tmp_path / "no.txt"), "no.txt cannot be read"),
        (("--text", tmp_path / "empty.txt", "--device", "cpu"), "the text is empty"),
        (("--data-dir", sets.folder), "is not the raw test text of WikiText-2 as published"),
        ((*text, "--stride", made.config.context), "--stride is"),
        ((*text, "--stride", 0), "--stride is 0"),
    ):
        monkeypatch.setattr("sys.argv", ["perplexity", str(made.folder), *map(str, arguments)])
        with pytest.raises(UserError, match=re.escape(said)):
            perplexity.main()
