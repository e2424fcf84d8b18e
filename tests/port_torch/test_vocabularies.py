"""Vocabularies beyond 16 bits and beyond their tokenizer, through the commands that train and hand over."""

import json
import shlex

import numpy as np
import pytest
import torch
import transformers

from core.checkpoint.manifest import load_manifest
from core.checkpoint.steps import find_step
from core.config import ModelConfig
from core.data.batches import heldout_windows
from core.data.dataset import open_dataset
from core.keys import Purpose, make_key
from core.model import init_params
from core.run.log import read_log
from tests.core.data.test_vocabularies import MANY, numbers, words_file, write_documents
from tests.core.test_special_tokens import CHAT
from tests.core.test_tokenizer import bpe_file
from tests.models import flat
from tests.reference import logits64
from tests.train_tpu.processes import run

TRAINING = ("--steps", "2", "--batch", "4", "--log-every", "1", "--sample-every", "2", "--prompts", "a")


@pytest.mark.slow
@pytest.mark.parametrize("module", ["train_tpu.run", "port_torch.train"])
def test_ids_beyond_16_bits_train(cache, tmp_path, module):
    """The loss of the first parameters, in float64, for ids that the words tell."""
    documents, data = numbers(MANY), tmp_path / "data"
    texts = [write_documents(tmp_path / f"{name}.jsonl", documents) for name in ("text", "held")]
    run(
        cache, texts[0], "--valid", f"held={texts[1]}", "--tokenizer", words_file(tmp_path),
        "--context", "16", "--out", data, module="train_tpu.prepare",
    )  # fmt: skip
    shape = ("--d-model", "16", "--n-layers", "1", "--n-heads", "1", "--d-mlp", "16", "--init-std", "0.3")
    out = tmp_path / "run"
    run(cache, *shape, "--context", "16", *TRAINING, "--data", data, "--out", out, module=module)
    model = ModelConfig(**load_manifest(find_step(out)).config["model"])
    assert model.vocab_size == MANY
    params = init_params(model, make_key(0, Purpose.INIT))
    leaves = {name: torch.tensor(leaf).double() for name, leaf in flat(params).items()}
    stream = [i for document in documents for i in (MANY - 2, *document, MANY - 1)]
    tokens, mask = heldout_windows(open_dataset(data), "held")
    scores = logits64(model, leaves, tokens[:, :-1].astype(np.int64)).log_softmax(-1).numpy()
    nll, predicted = 0.0, 0
    for row in range(len(tokens)):
        for place in np.flatnonzero(mask[row]):
            predicted += 1
            nll -= scores[row, place, stream[predicted]]
    first, *_, last = read_log(out, "eval")
    assert predicted == len(stream) - 1 and first["step"] == 0
    # A mean of float32 losses, each of logits near 5 that are off by 2e-6 of that.
    assert first["nll"] == pytest.approx(nll / predicted, abs=5e-5)
    assert last["step"] == 2 and last["nll"] != first["nll"]
    assert [row["step"] for row in read_log(out, "train")] == [0, 1]


@pytest.mark.slow
def test_a_padded_vocabulary_without_bos_from_command_to_command(cache, text, tmp_path):
    """A folder of transformers: imported, trained, grown, exported and tuned, with the same ids all along."""
    folder = tmp_path / "theirs"
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(bpe_file(tmp_path, CHAT)), eos_token="<|im_end|>"
    )
    theirs.save_pretrained(folder)
    config = transformers.LlamaConfig(
        vocab_size=400, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=64, tie_word_embeddings=True, bos_token_id=0, eos_token_id=2,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    imported, trained, exported = (tmp_path / name for name in ("imported", "run", "exported"))
    printed, _ = run(cache, folder, imported, module="port_torch.import_checkpoint")
    assert "400 rows" in printed
    command = shlex.split(printed.splitlines()[-1])
    flags = command[command.index("--init-from") : command.index("--data")]
    assert flags[-2:] == ["--tokenizer", f"{imported / 'tokenizer.json'},bos=none,eos=<|im_end|>"]
    assert flags[flags.index("--vocab-size") + 1] == "400"
    run(cache, *flags, *TRAINING, "--data", text, "--out", trained)
    record = load_manifest(find_step(trained)).tokenizer
    assert (record["bos"], record["eos"]) == (None, "<|im_end|>")
    grown, _ = run(cache, imported, "--op", "interleave", "--out", tmp_path / "grown", module="stacking.grow")
    assert "--vocab-size 400" in grown and ",bos=none,eos=<|im_end|>'" in grown

    run(cache, trained, exported, module="port_torch.convert")
    tokenizer = transformers.AutoTokenizer.from_pretrained(exported)
    model = transformers.AutoModelForCausalLM.from_pretrained(exported)
    assert (tokenizer.bos_token, tokenizer.eos_token, model.config.vocab_size) == (None, "<|im_end|>", 400)
    assert (model.generation_config.bos_token_id, model.generation_config.eos_token_id) == (None, 2)
    assert tokenizer("the cat")["input_ids"] == theirs("the cat")["input_ids"]
    # Ids without a text are drawn, too: two thirds of those of a model that knows nothing are.
    drawing = ("--prompt", "", "--max-new-tokens", "40", "--temperature", "5")
    for source, module in ((trained, "core.generate"), (exported, "port_torch.generate")):
        run(cache, source, *drawing, module=module)

    rows = tmp_path / "rows.jsonl"
    rows.write_text(
        "".join(json.dumps({"prompt": f"the cat {i} ", "response": "sat"}) + "\n" for i in range(9))
    )
    tuned = tmp_path / "tuned"
    run(cache, exported, "--data", rows, "--out", tuned, "--steps", "2", module="port_torch.finetune")
    again = tmp_path / "again"
    run(
        cache, "--from", tuned / "model", "--data", text, "--out", again, *TRAINING, module="port_torch.train"
    )
    result = transformers.AutoTokenizer.from_pretrained(again / "model")
    assert (result.bos_token, result.eos_token) == (None, "<|im_end|>")
