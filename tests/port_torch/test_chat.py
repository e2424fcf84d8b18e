"""Conversing with a tuned folder: the answers of transformers and of JAX, and what others read of it."""

import json
import shlex
import sys
from pathlib import Path

import pytest

import core.generate
import port_torch.chat
import port_torch.import_checkpoint
import port_torch.train
import stacking.grow
from core.chat import folder_template
from core.checkpoint.manifest import EXPORT_MANIFEST, load_manifest
from core.checkpoint.steps import find_step
from core.errors import UserError
from tests.port_torch.small_training import call
from tests.port_torch.trained import transformers_model
from tests.port_torch.tuned import CONTEXT, Tuned, tune
from tests.train_tpu.processes import run_here

GREEDY = ("--temperature", "0", "--max-new-tokens", "12")
QUESTIONS = ["Hi?", "Bye?", "Grüße, 3 + 4"]


@pytest.fixture(scope="module")
def checkpoint(tuned: Tuned, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model for JAX."""
    out = tmp_path_factory.mktemp("imported") / "checkpoint"
    with pytest.MonkeyPatch.context() as patch:
        call(patch, port_torch.import_checkpoint, tuned.folder, out)
    return out


@pytest.fixture
def answers(monkeypatch, capsys, tmp_path: Path):
    """What a command answers to piped lines."""

    def answers(module, *arguments, lines: list[str] = QUESTIONS) -> list[str]:
        (tmp_path / "lines").write_text("".join(f"{line}\n" for line in lines))
        capsys.readouterr()  # what transformers may have printed
        with (tmp_path / "lines").open() as file:
            monkeypatch.setattr(sys, "stdin", file)
            assert call(monkeypatch, module, *arguments, *GREEDY) == 0
        return capsys.readouterr().out.split("\n")[:-1]

    return answers


def theirs(folder: Path, questions: list[str], system: str | None = None) -> list[str]:
    """What transformers answers, one turn after the other."""
    from transformers import PreTrainedTokenizerFast

    tokenizer, model = PreTrainedTokenizerFast.from_pretrained(folder), transformers_model(folder)
    messages, said = [] if system is None else [{"role": "system", "content": system}], []
    for question in questions:
        messages.append({"role": "user", "content": question})
        inputs = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
        made = model.generate(**inputs, max_new_tokens=12, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        said.append(tokenizer.decode(made, skip_special_tokens=True))
        messages.append({"role": "assistant", "content": said[-1]})
    return said


def test_three_turns_are_those_of_transformers(tuned: Tuned, answers):
    expected = theirs(tuned.folder, QUESTIONS)
    assert expected[0] == "Yes."
    assert answers(port_torch.chat, tuned.folder) == expected
    expected = theirs(tuned.folder, QUESTIONS, system="Be é.")
    assert answers(port_torch.chat, tuned.folder, "--system", "Be é.") == expected


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["llama", "gpt"])
def test_on_a_gpu_the_kernels_answer(kind: str, monkeypatch, capsys, tmp_path: Path):
    """In bfloat16, whose greedy tokens are not float32's; what it was tuned to say leaves no doubt."""
    tuned = tune(tmp_path, kind, d_model=64, n_heads=2, d_mlp=96)  # sizes that the kernels have
    (tmp_path / "lines").write_text("Hi?\nHi?\n")
    with (tmp_path / "lines").open() as file:
        monkeypatch.setattr(sys, "stdin", file)
        assert call(monkeypatch, port_torch.chat, tuned.folder, "--backend", "cuda", *GREEDY) == 0
    out, err = capsys.readouterr()
    assert out == "Yes.\nYes.\n" and err.count("decoded by the CUDA kernels in bfloat16") == 1


@pytest.mark.slow
def test_jax_answers_as_pytorch_does(tuned: Tuned, checkpoint: Path, answers):
    """Also what nobody has tuned it to say: by another template, it goes on until it is cut off."""
    for options in ((), ("--template", "plain", "--system", "Be é.")):
        expected = answers(port_torch.chat, tuned.folder, *options)
        assert answers(core.generate, checkpoint, "--chat", *options) == expected


@pytest.mark.slow
def test_a_file_of_questions_is_answered_alike(tuned: Tuned, checkpoint: Path, monkeypatch, tmp_path: Path):
    """Also with conversations in it, in batches, and what was begun otherwise is refused."""
    said = theirs(tuned.folder, QUESTIONS)
    turns = [
        {"role": role, "content": content}
        for exchange in zip(QUESTIONS, said, strict=True)
        for role, content in zip(("user", "assistant"), exchange, strict=True)
    ]
    rows = [{"prompt": "Hi?", "id": 7}, {"messages": turns[:3]}, {"messages": turns[:5]}]
    given = tmp_path / "rows.jsonl"
    given.write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = ("--batch-file", given, "--batch", "2")
    ours, jax = tmp_path / "torch.jsonl", tmp_path / "jax.jsonl"
    assert call(monkeypatch, port_torch.chat, tuned.folder, *files, "--out", ours, *GREEDY) == 0
    assert call(monkeypatch, core.generate, checkpoint, "--chat", *files, "--out", jax, *GREEDY) == 0
    expected = [row | {"text": text} for row, text in zip(rows, said, strict=True)]
    assert [json.loads(line) for line in ours.read_text().splitlines()] == expected
    assert jax.read_text() == ours.read_text()


@pytest.mark.slow
def test_refusals(tuned: Tuned, checkpoint: Path, monkeypatch, tmp_path: Path):
    plain, run = tuned.arguments[0], tuned.folder.parent
    for module, arguments, message in (
        (port_torch.chat, (plain,), "has no chat template, so it has not learned to converse"),
        (port_torch.chat, (plain, "--template", "chatml"), "which the tokenizer .* lacks"),
        (port_torch.chat, (plain, "--template", tmp_path / "no"), "there is no template"),
        (port_torch.chat, (run,), "whose model is .*: give that folder"),
        (port_torch.chat, (checkpoint,), r"use `python -m core\.generate .* --chat`"),
        (core.generate, (tuned.folder, "--chat"), r"use `python -m port_torch\.chat"),
        (core.generate, (checkpoint, "--chat", "--prompt", "a"), "leave --prompt out"),
        (core.generate, (checkpoint, "--system", "a"), "give --chat with them"),
        (port_torch.chat, (tuned.folder, "--batch-file", "a"), "go together"),
    ):
        with pytest.raises(UserError, match=message):
            call(monkeypatch, module, *arguments)


def test_what_vllm_reads(tuned: Tuned):
    """As its loader does: the class by name, the length, the ids that end, the template, sampling defaults.

    Not from its code, which is not installed here: from the files alone, as its documentation names them.
    """
    config, generation, tokenizer = (
        json.loads((tuned.folder / name).read_text())
        for name in ("config.json", "generation_config.json", "tokenizer_config.json")
    )
    library = json.loads((tuned.folder / "tokenizer.json").read_text())
    ids = {token["content"]: token["id"] for token in library["added_tokens"]}
    end = ids["<|im_end|>"]
    assert config["architectures"] in (["LlamaForCausalLM"], ["MtlmForCausalLM"])
    assert config["max_position_embeddings"] == tokenizer["model_max_length"] == CONTEXT
    assert config["vocab_size"] >= max(ids.values()) + 1
    # It stops at the tokenizer's eos and at those of generation_config.json.
    assert ids[tokenizer["eos_token"]] == config["eos_token_id"] == generation["eos_token_id"] == end
    assert ids[tokenizer["bos_token"]] == config["bos_token_id"] == generation["bos_token_id"]
    assert tokenizer["chat_template"] == load_manifest(tuned.folder, EXPORT_MANIFEST).chat_template
    # It takes these of generation_config.json for defaults of its own; there are none to surprise with.
    sampling = {"temperature", "top_k", "top_p", "min_p", "repetition_penalty", "max_new_tokens"}
    assert not sampling & generation.keys()


@pytest.mark.slow
def test_a_template_stays_with_its_model(tuned: Tuned, checkpoint: Path, monkeypatch, tmp_path, capsys):
    """Imported, grown, trained further in either engine, resumed, and exported again."""
    template = load_manifest(tuned.folder, EXPORT_MANIFEST).chat_template
    assert template is not None and load_manifest(checkpoint).chat_template == template
    grown = tmp_path / "grown"
    assert call(monkeypatch, stacking.grow, checkpoint, "--op", "identity", "--out", grown) == 0
    assert load_manifest(grown).chat_template == template
    more = ("--batch", "2", "--eval-windows", "1", "--prompts", "a", "--sample-every", "1000")
    words = shlex.split(capsys.readouterr().out.rpartition("next: ")[2])
    trained, text = tmp_path / "trained", tmp_path / "text.txt"
    text.write_text("Some text to train on. " * 400)
    begin = [*words[3:-1], text, "--out", trained, *more]
    run_here(*begin, "--steps", "1")
    run_here("--out", trained, "--steps", "2", "--allow-change", "steps")  # resumed
    assert load_manifest(find_step(trained)).chat_template == template
    out = tmp_path / "exported"
    run_here(trained, out, module="port_torch.convert")
    assert folder_template(out) == template
    begin = ("--from", tuned.folder, "--data", text, "--out", tmp_path / "torch", *more)
    assert call(monkeypatch, port_torch.train, *begin, "--steps", "1") == 0
    assert folder_template(tmp_path / "torch" / "model") == template
    assert "next: python -m port_torch.chat" in capsys.readouterr().out
