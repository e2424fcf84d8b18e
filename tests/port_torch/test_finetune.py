"""Fine-tuning: rows and packing, against transformers on single rows; LoRA; the command."""

import dataclasses
import functools
import json
import os
import re
import shlex
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import port_torch.generate
from core.checkpoint.manifest import EXPORT_MANIFEST, load_manifest
from core.data.examples import IGNORE, Example, examples_of
from core.data.row_packing import PADDING, pack, packed_batches
from core.data.sequences import Rows
from core.data.tuning_rows import Row, RowFile, instruction, read_rows
from core.errors import UserError
from core.run.interrupt import EXIT_SAVED
from core.run.log import read_log
from core.run.settings import flatten
from core.run.tuning import open_rows
from core.run.tuning_data import make_tuning_data
from core.tokenizer import load_tokenizer
from port_torch.card import model_card
from port_torch.finetune import FinetuneConfig
from port_torch.folder import weights_hash
from port_torch.model import load
from port_torch.train import TrainConfig
from port_torch.training.batches import document_starts, empty_rows
from port_torch.training.distributed import Distributed
from port_torch.training.settings import MirrorOptimizerConfig
from port_torch.training.setup import is_compiled
from tests.core.test_tokenizer import bpe_file
from tests.models import random_params
from tests.port_torch.folders import SMALL, manifest_of, write_export
from tests.port_torch.small_training import (
    ALONE,
    Killed,
    call,
    finetune_here,
    kill,
    losses,
    make_train_step,
    plain_losses,
    stop_before,
    theirs_of,
    update_losses,
)
from tests.port_torch.trained import transformers_model
from tests.port_torch.tuned import EXCHANGE, Tuned
from tests.train_tpu.processes import refusal

BYTES = load_tokenizer("bytes")
OPTIM = MirrorOptimizerConfig(lr=3e-3, clip=0.5, eps=1e-6)
ROWS = [Row(f"{i} squared?", f"{i * i}, " * (1 + i % 5)) for i in range(18)]
SMALL_RUN = (
    "--steps", "6", "--batch", "2", "--lr", "0.003", "--validation", "0.2", "--eval-every", "3",
    "--save-every", "2", "--log-every", "1",
)  # fmt: skip


def examples() -> list[Example]:
    return [example for row in ROWS for example in examples_of(row, BYTES, 96)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An exported folder of each kind, with parameters that each matter."""
    root = tmp_path_factory.mktemp("origins")
    made = {k: write_export(root / k, config, random_params(config, std=0.1)) for k, config in SMALL.items()}
    return made


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    lines = [{"instruction": f"Square {i}.", "output": str(i * i)} for i in range(30)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture(scope="module")
def finished(folders, data, tmp_path_factory) -> dict[str, Path]:
    """Uninterrupted runs, of LoRA on the Llama and of all weights of the other."""
    root = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        assert finetune_here(patch, *run_arguments("llama", folders, data, root / "llama")) == 0
        assert finetune_here(patch, *run_arguments("gpt", folders, data, root / "gpt")) == 0
    return {kind: root / kind for kind in SMALL}


def run_arguments(kind: str, folders: dict[str, Path], data: Path, out: Path) -> tuple:
    lora = ("--lora-rank", "4", "--lora-dropout", "0.2", "--lora-targets", "attention", "up")
    lora = lora if kind == "llama" else ()
    return (folders[kind], "--data", data, "--out", out, *SMALL_RUN, *lora)


def test_only_the_response_and_its_end_are_learned():
    (example,) = examples_of(Row("ab?", "cd"), BYTES, 96)
    a, b, q, c, d = b"ab?cd"
    assert example.tokens.tolist() == [BYTES.bos, a, b, q, c, d]
    assert example.targets.tolist() == [IGNORE, IGNORE, IGNORE, c, d, BYTES.eos]
    assert example.n_bytes == 2
    (text,) = examples_of(Row("", "cd"), BYTES, 96)
    assert text.tokens.tolist() == [BYTES.bos, c, d] and text.targets.tolist() == [c, d, BYTES.eos]


def test_what_is_longer_than_the_context():
    fits, too_long = Row("a" * 50, "b" * 45), Row("a" * 50, "b" * 46)
    assert len(examples_of(fits, BYTES, 96)[0].tokens) == 96 and examples_of(too_long, BYTES, 96) == []
    pieces = examples_of(Row("", "abc" * 70), BYTES, 96)
    assert [len(p.tokens) for p in pieces] == [96, 96, 19]
    learned = [token for p in pieces for token in p.targets.tolist()]
    assert learned == [*(b"abc" * 70), BYTES.eos] and sum(p.n_bytes for p in pieces) == 210


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=40))
def test_packing_holds_every_example_once(lengths: list[int]):
    made = [
        Example(np.full(n, i + 1, np.int32), np.arange(n, dtype=np.int32), n) for i, n in enumerate(lengths)
    ]
    packed = pack(made, 12)
    found = []
    for tokens, targets, documents in zip(*packed, strict=True):
        assert (np.diff(documents) >= 0).all()
        for number in np.unique(documents):
            inside = documents == number
            if tokens[inside].any():
                found.append(int(tokens[inside][0]) - 1)
                assert np.array_equal(tokens[inside], made[found[-1]].tokens)
                assert np.array_equal(targets[inside], made[found[-1]].targets)
            else:
                assert (targets[inside] == IGNORE).all()
    assert sorted(found) == list(range(len(lengths)))
    assert sum(2 * (row == 0).sum() > 12 for row in packed.tokens) <= 1  # no two rows would fit into one


def test_padding_comes_after_however_many_documents():
    (documents,) = pack([Example(np.ones(2, np.int32), np.ones(2, np.int32), 2)] * 500, 1024).documents
    assert documents[:1000].tolist() == [number for number in range(1, 501) for _ in range(2)]
    assert (documents[1000:] > 500).all()


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 9), st.integers(0, 2**32 - 1))
def test_where_documents_begin(parts: int, rows: int, length: int, seed: int):
    """Counted one place after the other."""
    documents = np.sort(np.random.default_rng(seed).integers(4, size=(parts * rows, length)))
    starts = document_starts(documents, parts)
    assert starts.dtype == np.int32 and (starts.shape[1] - 1).bit_count() == 1
    most = 0
    for part, found in enumerate(starts):
        expected = []
        for place in range(rows * length):
            row, column = part * rows + place // length, place % length
            if column == 0 or documents[row, column] != documents[row, column - 1]:
                expected.append(place)
        assert found[: len(expected)].tolist() == expected
        assert set(found[len(expected) :].tolist()) == {rows * length}  # nothing, and then empty documents
        most = max(most, len(expected))
    assert starts.shape[1] - 1 < 2 * most


@pytest.mark.parametrize("packed", [True, False])
def test_rows_of_nothing_have_the_parts_of_those_that_come(packed: bool):
    """Those by which a step's memory is tried."""
    parts = empty_rows(2, 8, packed)
    assert [None if part is None else (part.shape, part.dtype) for part in parts] == [
        ((2, 8), np.int32), ((2, 8), np.int32), ((2, 8), np.int32) if packed else None
    ]  # fmt: skip


def test_an_epoch_holds_every_row_once_in_another_order_each():
    packed = pack(examples(), 96)
    n = len(packed.tokens)
    assert n == 5

    def numbers(seed: int, start: int, rows: slice, count: int) -> list[int]:
        batches = packed_batches(packed, seed=seed, batch=2, start=start, rows=rows)
        read = [next(batches) for _ in range(count)]
        assert not any(one.bad.any() for one in read)
        return [int(r) for one in read for r in one.records]

    order = numbers(0, 0, slice(0, 2), n)
    assert sorted(order[:n]) == sorted(order[n:]) == list(range(n)) and order[:n] != order[n:]
    assert numbers(0, 6, slice(0, 2), 2) == order[6:10] and numbers(1, 0, slice(0, 2), n) != order
    assert numbers(0, 0, slice(1, 2), 3) == order[1:6:2]


@pytest.mark.parametrize("kind", SMALL)
def test_packed_rows_train_as_single_ones_do_in_transformers(kind: str, folders):
    """Document masks, positions, targets, the sum over parts, AdamW: equal to each row on its own."""
    packed = pack(examples(), 96)
    assert len(ROWS) / len(packed.tokens) > 2.5
    batches = [packed.part(slice(0, 4)), packed.part(slice(1, 5)), packed.part(slice(0, 4))]
    rates = [OPTIM.lr] * 3
    ours = update_losses(make_train_step(load(folders[kind]), OPTIM, z_loss=1e-3), batches, rates, parts=2)
    theirs = plain_losses(
        theirs_of(folders[kind], SMALL[kind]), [alone(b) for b in batches], rates, OPTIM, z_loss=1e-3
    )
    # Single rows and packed ones add their sums in other orders: see test_train.TOLERANCE.
    np.testing.assert_allclose(ours, theirs, rtol=2e-5)


def alone(rows: Rows) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The documents of packed rows, each by itself, padding left out."""
    found = []
    for tokens, targets, documents in zip(*rows, strict=True):
        for number in set(documents) - {PADDING}:
            inside = documents == number
            found.append(tuple(torch.from_numpy(a[inside].astype(np.int64)) for a in (tokens, targets)))
    return found


@pytest.mark.parametrize("kind", SMALL)
def test_a_rows_loss_does_not_depend_on_its_neighbours(kind: str, folders):
    """To the bit, and so do no gradients flow: neighbours before and behind are exchanged for others."""
    model = load(folders[kind])
    packed = pack(examples(), 96)
    tokens, _, documents = (torch.from_numpy(array[:1].astype(np.int64)) for array in packed)
    assert set(documents[0].tolist()) >= {1, 2, 3}
    inside = documents[0] == 2
    other = torch.where(inside, tokens, (tokens + 7) % 258)
    hidden = [model(t, documents=documents)[0, inside] for t in (tokens, other)]
    assert torch.equal(*hidden)
    assert not torch.equal(model(tokens)[0, inside], model(other)[0, inside])  # without documents they leak
    single = model(tokens[:, inside])[0]
    assert torch.allclose(hidden[0], single, atol=2e-5)
    embedded = model.embed.weight
    (gradient,) = torch.autograd.grad(model(tokens, documents=documents)[0, inside].sum(), embedded)
    assert set(gradient.abs().sum(1).nonzero()[:, 0].tolist()) <= set(tokens[0, inside].tolist())


def test_the_command_trains_and_tells_of_it(finished, folders, data, tmp_path, monkeypatch):
    for kind, folder in finished.items():
        evals = read_log(folder, "eval")
        assert [row["step"] for row in evals] == [0, 3, 6] and evals[-1]["nll"] < evals[0]["nll"] - 0.1
        samples = read_log(folder, "sample")
        assert [row["step"] for row in samples] == [0, 3, 6] and len(samples[0]["texts"]) == 3
        assert all(text.startswith("### Instruction:\nSquare ") for text in samples[0]["texts"])
        card = (folder / "model" / "README.md").read_text()
        assert "fine-tuned to follow instructions" in card and "### Input:\n{input}" in card
        manifest = load_manifest(folder / "model", EXPORT_MANIFEST)
        assert [entry["operation"] for entry in manifest.lineage] == ["test", "finetune", "export"]
        assert f"| trained | {manifest.lineage[1]['trained']} |" in card
        assert str(folder.parent) not in card + manifest.to_json()
        ids = torch.arange(60)[None]
        ours, before = load(folder / "model"), load(folders[kind])
        theirs = transformers_model(folder / "model")(ids).logits
        assert torch.allclose(ours.logits(ours(ids)), theirs, atol=2e-5)
        frozen = torch.equal(ours.embed.weight, before.embed.weight)
        assert frozen is (kind == "llama")  # LoRA leaves the embedding
        assert not torch.equal(ours.layers[0].attn.q.weight, before.layers[0].attn.q.weight)
    adapter = finished["llama"] / "adapter"
    assert not (finished["gpt"] / "adapter").exists()
    settings = json.loads((adapter / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(folders["llama"])
    assert settings["target_modules"] == ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj"]
    assert (settings["r"], settings["lora_alpha"], settings["lora_dropout"]) == (4, 8, 0.2)
    manifest = load_manifest(adapter, EXPORT_MANIFEST)
    assert manifest.lineage[1]["sha256"] == weights_hash(folders["llama"])
    assert str(adapter.parent) not in manifest.to_json() and (adapter / "tokenizer.json").exists()
    with pytest.raises(UserError, match=r"is a LoRA adapter: merge it .* port_torch\.merge .*adapter FOLDER"):
        finetune_here(monkeypatch, adapter, "--data", data, "--out", tmp_path / "out")
    state = (finished["llama"] / "checkpoints" / "00000006" / "state.safetensors").stat().st_size
    assert state < (folders["llama"] / "model.safetensors").stat().st_size  # the adapters and no more


@pytest.mark.parametrize("kind", ["llama", pytest.param("gpt", marks=pytest.mark.slow)])
def test_a_resumed_run_is_equal_to_the_bit(
    kind: str, finished, folders, data, tmp_path: Path, monkeypatch, capsys
):
    arguments = run_arguments(kind, folders, data, tmp_path / "run")
    with monkeypatch.context() as patch:
        stop_before(patch, 5, kill)
        with pytest.raises(Killed):
            finetune_here(patch, *arguments)
    with monkeypatch.context() as patch:
        stop_before(patch, 4, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert finetune_here(patch, *arguments) == EXIT_SAVED
    assert finetune_here(monkeypatch, *arguments) == 0
    assert losses(tmp_path / "run") == losses(finished[kind])
    (advice,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("next: ")]
    module, *typed = shlex.split(advice.removeprefix("next: python -m "))
    assert module == "port_torch.generate" and typed[0] == str(tmp_path / "run" / "model")
    call(monkeypatch, port_torch.generate, *typed, "--max-new-tokens", "1")
    shown = capsys.readouterr().out
    assert shown.startswith("### Instruction:\nName three colours.\n\n### Response:\n")
    ours, theirs = (f / "model" / "model.safetensors" for f in (tmp_path / "run", finished[kind]))
    assert ours.read_bytes() == theirs.read_bytes()


def test_training_is_compiled_by_default_and_fine_tuning_is_not():
    gpu = Distributed(0, 1, torch.device("cuda", 0))
    tuned = FinetuneConfig(init_from=Path("model"), data=Path("rows.jsonl"), out=Path("run"))
    for config, default in ((TrainConfig(), True), (tuned, False)):
        assert is_compiled(config, gpu) is default and not is_compiled(config, ALONE)
        for asked in (True, False):
            overridden = dataclasses.replace(config, compile=asked)
            assert is_compiled(overridden, gpu) is is_compiled(overridden, ALONE) is asked
        # As records have it that were written when fine-tuning was compiled, too: their runs resume.
        assert flatten(config)["compile"] is None


def test_a_removed_model_is_written_again(finished, folders, data, tmp_path: Path, monkeypatch, capfd):
    """From the checkpoint, equal to the bit; without one it is told, and nothing is trained."""
    run = shutil.copytree(finished["gpt"], tmp_path / "run")
    arguments = run_arguments("gpt", folders, data, run)
    weights = run / "model" / "model.safetensors"
    before = weights.read_bytes()
    weights.unlink()
    assert finetune_here(monkeypatch, *arguments) == 0
    out, err = capfd.readouterr()
    assert (
        "model.safetensors is missing" in err and "written again from step 6" in err and "its model:" in out
    )
    assert weights.read_bytes() == before and (run / "damaged-model" / "config.json").exists()
    log = (run / "metrics.jsonl").read_bytes()
    shutil.rmtree(run / "checkpoints")
    assert finetune_here(monkeypatch, *arguments) == 0 and "has finished; its model" in capfd.readouterr().out
    weights.unlink()
    with pytest.raises(UserError, match=r"its checkpoints were removed.*model\.safetensors is missing"):
        finetune_here(monkeypatch, *arguments)
    assert (run / "metrics.jsonl").read_bytes() == log


def test_the_first_loss_is_that_of_the_responses_alone(finished, folders, data):
    """By transformers, one row after the other, over the rows that the first batch held."""
    log = read_log(finished["gpt"], "eval")[0]
    file = read_rows(data)
    model = theirs_of(folders["gpt"], SMALL["gpt"])
    nll, n = {}, {}
    for row in file.rows:
        ids = [256, *row.prompt.encode(), *row.response.encode(), 257]
        labels = [-100] * (1 + len(row.prompt.encode())) + ids[1 + len(row.prompt.encode()) :]
        with torch.inference_mode():
            loss = model(torch.tensor([ids]), labels=torch.tensor([labels]), use_cache=False).loss
        nll[row], n[row] = float(loss) * (len(row.response) + 1), len(row.response) + 1
    # Which six rows are held out is drawn; the score is theirs: found among the samples and by their number.
    shown = {text.split("### Response")[0] for text in read_log(finished["gpt"], "sample")[0]["texts"]}
    assert len(shown) == 3 and log["scored_tokens"] <= sum(n.values())
    means = sorted(nll[row] / n[row] for row in file.rows)
    assert means[0] <= log["nll"] <= means[-1]


def file_of(folder: Path, *lines: dict) -> RowFile:
    path = folder / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    return read_rows(path)


def test_the_forms_of_rows(tmp_path: Path):
    def rows_of(*lines: dict) -> tuple[list[Row], str]:
        file = file_of(tmp_path, *lines)
        return file.rows, file.form

    assert rows_of({"text": "a\u2028b", "id": 3}) == ([Row("", "a\u2028b")], "text")
    assert rows_of({"prompt": "a", "response": "b"}) == ([Row("a", "b")], "prompt")
    bare = "### Instruction:\nDo.\n\n### Response:\n"
    for fields in ({"output": "b"}, {"response": "b"}, {"output": "b", "input": ""}):
        assert rows_of({"instruction": "Do.", **fields}) == ([Row(bare, "b")], "instruction")
    (row,), _ = rows_of({"instruction": "Do {x}.", "input": "{y}", "output": "b"})
    assert row.prompt == "### Instruction:\nDo {x}.\n\n### Input:\n{y}\n\n### Response:\n"
    assert instruction("Do.") == bare
    assert rows_of({"prompt": "a", "completion": "b"}) == ([Row("a", "b")], "prompt")
    assert rows_of({"instruction": "Do.", "input": None, "output": "b"}) == ([Row(bare, "b")], "instruction")
    assert rows_of({"text": None, "prompt": "a", "response": "b", "output": ""})[0] == [Row("a", "b")]


def test_rows_fewer_than_a_batch_are_said(data: Path, tmp_path: Path):
    """Thirty short rows, packed into a few sequences: 16 at once take some of them twice."""
    for batch, told in ((16, True), (2, False)):
        config = FinetuneConfig(init_from=tmp_path, data=data, out=tmp_path / "out", batch=batch)
        table = dict(make_tuning_data(config, read_rows(data), BYTES, None, SMALL["llama"]).table)
        n = int(re.search(r"into (\d+) sequences", table["data"])[1])
        assert 2 <= n < 16 and ("few rows" in table) is told
        assert not told or f"takes 16 sequences of {n}" in table["few rows"]


def test_prompts_too_long_to_be_samples_and_a_share_of_all_rows_are_said(tmp_path: Path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"prompt": "a" * 60, "response": "b"}) + "\n")
    config = FinetuneConfig(init_from=tmp_path, data=rows, out=tmp_path / "out")
    made = make_tuning_data(config, read_rows(rows), BYTES, None, SMALL["llama"])  # of a context of 96
    assert not made.prompts and "at most 48 tokens" in dict(made.table)["samples"]
    rows.write_text(rows.read_text() * 6)
    with pytest.raises(UserError, match=r"--validation 0.99 holds out all of the 6 rows"):
        make_tuning_data(
            dataclasses.replace(config, validation=0.99), read_rows(rows), BYTES, None, SMALL["llama"]
        )


def test_the_models_own_template_stays_where_rows_have_no_turns(data: Path, tmp_path: Path):
    config = FinetuneConfig(init_from=tmp_path, data=data, out=tmp_path / "out")
    made = make_tuning_data(config, read_rows(data), BYTES, "the model's own", SMALL["llama"])
    assert made.record(config)["chat_template"] == "the model's own"
    assert made.told == {"rows": "rows.jsonl", "form": "instruction", "trained": "all weights"}


@pytest.mark.parametrize(
    ("told", "template", "expected"),
    [
        (
            {"form": "chat", "template": "chatml"},
            "{{ x }}",
            ("converse", "apply_chat_template", "| chatml |"),
        ),
        ({}, "{{ x }}", ("converse", "apply_chat_template")),  # an older run, which did not say of what form
        (
            {"form": "prompt", "example": "3 squared?"},
            "{{ x }}",
            ('tokenizer("3 squared?", return',),
        ),
        ({"form": "instruction"}, None, ("follow instructions", "### Input:\n{input}")),
        ({"form": "text"}, None, ("on further text",)),
        ({}, None, ("fine-tuned on rows",)),
    ],
)
def test_the_card_says_how_a_model_was_tuned(
    told: dict, template: str | None, expected: tuple, tmp_path: Path
):
    """By its lineage, whichever engine wrote that; until it is trained further on text."""
    start = {"operation": "finetune", "path": "/home/me/runs/base/checkpoints/00000009", "rows": "a.jsonl"}
    of = functools.partial(model_card, "tuned", SMALL["llama"], held_out=[], tokenizer=BYTES)
    manifest = dataclasses.replace(
        manifest_of(SMALL["llama"]), lineage=[start | told], chat_template=template
    )
    card = of(manifest=manifest)
    for text in (
        *expected,
        "ends with `</s>`",
        "| rows | a.jsonl |",
        "| fine-tuned from | base/checkpoints/00000009 |",
    ):
        assert text in card, text
    assert ("apply_chat_template" in card) is ("apply_chat_template" in expected) and "/home" not in card
    other = of(manifest=manifest, tokenizer=load_tokenizer(str(bpe_file(tmp_path, ["<|endoftext|>"]))))
    assert "ends with `<|endoftext|>`" in other and "puts `<|endoftext|>` before" in other
    odd = {"form": "prompt", "example": "a | b?\nA:"}
    assert r'| example | "a \| b?\nA:" |' in of(manifest=dataclasses.replace(manifest, lineage=[start | odd]))
    further = [*manifest.lineage, {"operation": "init_from", "path": "b"}]
    assert "not tuned to follow" in of(manifest=dataclasses.replace(manifest, lineage=further))


def test_every_field_of_a_row_is_used_or_named(tmp_path: Path):
    """Dolly's context is the input, or its answers would come out of nothing; its category is named."""
    dolly = {"instruction": "Who?", "context": "Ada wrote it.", "response": "Ada.", "category": "closed_qa"}
    file = file_of(tmp_path, dolly, dolly | {"id": 0, "context": "", "system": "", "history": []})
    shown = "### Instruction:\nWho?\n\n### Input:\nAda wrote it.\n\n### Response:\n"
    assert file.rows == [Row(shown, "Ada."), Row(instruction("Who?"), "Ada.")]
    assert file.unused == {"category": 2, "id": 1} and file.has_context
    alpaca = {"instruction": "Who?", "input": "Ada wrote it.", "output": "Ada."}
    assert file_of(tmp_path, alpaca).rows == file.rows[:1] and not file_of(tmp_path, alpaca).has_context


def test_conversations(tuned: Tuned, monkeypatch, capsys):
    """From rows of messages to a folder with which transformers converses, a batch of questions at once."""
    from transformers import AutoTokenizer

    said, folder = tuned.said, tuned.folder
    assert "new tokens" in said and "(from 258 rows to 320)" in said
    assert "next: python -m port_torch.chat" in said
    assert "4 turns at the ends of conversations" in said and "2 turns that nobody answers" in said
    manifest = load_manifest(folder, EXPORT_MANIFEST)
    tokenizer, model = AutoTokenizer.from_pretrained(folder), transformers_model(folder)
    assert tokenizer.chat_template == manifest.chat_template and model.config.vocab_size == 320
    asked = [EXCHANGE[:1], EXCHANGE + EXCHANGE[:1]]  # of two lengths
    inputs = tokenizer.apply_chat_template(
        asked, add_generation_prompt=True, padding=True, return_dict=True, return_tensors="pt"
    )
    assert (inputs["attention_mask"][0] == 0).any()
    made = model.generate(**inputs, max_new_tokens=12, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    answers = tokenizer.batch_decode(made, skip_special_tokens=True)
    assert answers == ["Yes."] * 2  # and then it stops, at the token that it learned to end with
    # The same command finds its run again, whose tokenizer is in its folder.
    assert finetune_here(monkeypatch, *tuned.arguments) == 0
    assert "has made its 24 updates" in capsys.readouterr().out


def test_a_template_that_cannot_be_used_is_refused_with_the_rows(data: Path, tmp_path: Path):
    """Which is before anything slow is imported."""
    file = tmp_path / "own.jinja"
    config = FinetuneConfig(init_from=tmp_path, data=data, out=tmp_path / "out", chat=True)
    for text, message in (
        ("{{ raise_exception('no') }}", "own.jinja fails at the turns user, assistant: no"),
        ("{% for m in messages %}", "own.jinja is no Jinja template"),
        ("{{ range(1000000) | length }}", "own.jinja fails at the turns user, assistant: Range too big"),
        ("{{ messages[0]['content'] }}", "own.jinja leaves out what the assistant says"),
    ):
        file.write_text(text)
        with pytest.raises(UserError, match=message):
            open_rows(dataclasses.replace(config, template=str(file)))
    assert open_rows(dataclasses.replace(config, template="plain")).form == "chat"  # which names eos_token


def test_templates(folders, data, tmp_path: Path, monkeypatch, capsys):
    """Without new tokens adapters will do; with them they are refused, and so is a template for no one."""
    common = (folders["llama"], "--data", data, "--steps", "2", "--batch", "2", "--lora-rank", "4")
    with pytest.raises(UserError, match="2 tokens that are new to the model, and adapters do not train"):
        finetune_here(monkeypatch, *common, "--chat", "--out", tmp_path / "a")
    with pytest.raises(UserError, match="--template is for conversations"):
        finetune_here(monkeypatch, *common, "--template", "plain", "--out", tmp_path / "a")
    assert not (tmp_path / "a").exists()
    assert finetune_here(monkeypatch, *common, "--chat", "--template", "plain", "--out", tmp_path / "b") == 0
    assert "'chat'" in capsys.readouterr().out
    assert "### Assistant" in load_manifest(tmp_path / "b" / "model", EXPORT_MANIFEST).chat_template


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"text": "Below is", "instruction": "a", "output": "b"},
            r"both 'text' and 'instruction'.*del\(.text\)",
        ),
        ({"text": "Below is", "response": "b"}, "both 'text' and 'response'"),
        ({"prompt": "a", "instruction": "a", "output": "b"}, "both 'prompt' and 'instruction'"),
        ({"prompt": "a", "response": "b", "completion": "c"}, "both 'response' and 'completion'"),
        ({"instruction": "a", "input": "c", "context": "d", "output": "b"}, "both 'input' and 'context'"),
        (
            {"prompt": "a", "input": "c", "response": "b"},
            "field 'input', for which a row of 'prompt' has no place",
        ),
        (
            {"instruction": "a", "output": "b", "system": "c"},
            "field 'system', for which a row of 'instruction'",
        ),
        ({"instruction": "a", "output": "b", "history": [["c", "d"]]}, "field 'history', for which"),
        ({"messages": [{"role": "user", "content": "a"}]}, "has no turn of the assistant"),
        ({"prompt": [{"role": "user", "content": "a"}], "completion": [{}]}, "turn 1 of completion must say"),
    ],
)
def test_rows_that_would_be_falsified_are_refused(fields: dict, message: str, tmp_path: Path):
    with pytest.raises(UserError, match=f"line 2.*{message}"):
        file_of(tmp_path, {"instruction": "a", "output": "b"}, fields)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (['{"text": "a"}', "{"], "line 2 is not JSON"),
        (["[1]"], "line 1 is not a JSON object"),
        (['{"prompt": "a"}'], r'line 1 has the fields prompt: give \{"text"\}'),
        (['{"text": 3}'], "line 1: text must be a string, got 3"),
        (['{"prompt": "a", "response": " "}'], "line 1 has nothing to learn: its response is empty"),
        (
            ['{"text": "a"}', '{"prompt": "a", "response": "b"}'],
            "row of 'prompt', and those before are of 'text'",
        ),
        ([""], "is empty"),
        (
            ['{"prompt": "' + "a" * 200 + '", "response": "b"}'] * 2,
            "no row of .* to train on fits ",
        ),
        (['{"messages": []}'], r"line 1 has the fields messages \(empty\): give"),
    ],
)
def test_rows_that_are_refused(lines, message, folders, tmp_path: Path, monkeypatch):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(lines))
    with pytest.raises(UserError, match=message):
        finetune_here(monkeypatch, folders["gpt"], "--data", path, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_refusals(finished, folders, data, tmp_path: Path, monkeypatch):
    out = tmp_path / "out"
    for arguments, message in (
        ((folders["gpt"], "--data", tmp_path / "no", "--out", out), " cannot be read"),
        ((tmp_path, "--data", data, "--out", out), "has no config.json"),
        ((tmp_path, "--data", "none", "--out", data), "is a file: name another folder"),
        ((tmp_path, "--data", "none", "--out", folders["gpt"].parent), "not an MTLM run"),
        ((folders["gpt"], "--data", data, "--out", out, "--validation", "1"), "--validation is 1.0"),
        (
            (folders["gpt"], "--data", data, "--out", out, "--lora-rank", "2", "--lora-targets", "gate"),
            "'gate', which this model does not have: its MLP is gelu",
        ),
        (run_arguments("gpt", folders, data, finished["llama"]), "has --lora-dropout 0.2, not None"),
        (
            (*run_arguments("llama", folders, data, finished["llama"]), "--validation", "0.1"),
            "--validation 0.2",
        ),
    ):
        with pytest.raises(UserError, match=message):
            finetune_here(monkeypatch, *arguments)
    changed = write_export(tmp_path / "other", SMALL["llama"], random_params(SMALL["llama"], seed=1))
    arguments = run_arguments("llama", {"llama": changed}, data, finished["llama"])
    with pytest.raises(UserError, match="was not started from the weights that are given now"):
        finetune_here(monkeypatch, *arguments)
    assert not out.exists()


@pytest.mark.slow
def test_a_refusal_is_one_sentence_and_help_helps(cache: Path, folders, tmp_path: Path):
    message = refusal(cache, folders["gpt"], "--data", "no", "--out", tmp_path, module="port_torch.finetune")
    assert "no cannot be read" in message
