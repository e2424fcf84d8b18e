"""Imports end to end: what is written, what is refused, and that training starts from it."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import scipy.special
import tokenizers
import torch
import transformers

import port_torch.convert
from core import cli
from core.checkpoint.checkpointer import restore_params
from core.checkpoint.manifest import EXPORT_MANIFEST, load_manifest, seal
from core.checkpoint.steps import find_step
from core.config import ModelConfig, preset, training_flags
from core.data.batches import heldout_windows
from core.data.dataset import open_dataset
from core.errors import UserError
from core.loss import cross_entropy
from core.model import abstract_params, forward, head_table
from core.run.log import read_log
from core.run.settings import model_config
from core.tokenizer import load_tokenizer, tokenizer_record
from port_torch.card import held_out_scores
from port_torch.hf_tokenizer import write_tokenizer
from port_torch.import_checkpoint import main
from port_torch.model import load
from tests.models import random_params, whole_logits
from tests.port_torch.folders import (
    SMALL,
    manifest_of,
    tensors_of,
    write_checkpoint,
    write_export,
    write_folder,
)
from tests.port_torch.originals import TinyGPT, mtlm1_logits, mtlm1_weights, mtlm2_state
from tests.train_tpu.processes import refusal_here, run_here
from train_tpu.config import RunConfig

LLAMA = SMALL["llama"]
PARAMS = {kind: random_params(config) for kind, config in SMALL.items()}


@pytest.fixture
def call(monkeypatch, capsys):
    """Runs a command's main() in this process; gives what it printed on stdout."""

    def call(*arguments, main=main) -> str:
        monkeypatch.setattr("sys.argv", ["command", *map(str, arguments)])
        assert main() == 0
        return capsys.readouterr().out

    return call


def opened(out: Path) -> tuple[ModelConfig, dict]:
    config = ModelConfig(**load_manifest(out).config["model"])
    return config, restore_params(out, abstract_params(config))


def assert_same_bits(a: dict, b: dict) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype and np.asarray(x).tobytes() == np.asarray(y).tobytes()


# --- our own exports ---


@pytest.mark.parametrize("kind", ["gpt", pytest.param("llama", marks=pytest.mark.slow)])
def test_an_export_comes_back_to_the_bit(call, tmp_path, kind):
    config, params = SMALL[kind], PARAMS[kind]
    checkpoint = write_checkpoint(tmp_path / "checkpoint", config, params)
    call(checkpoint, tmp_path / "folder", main=port_torch.convert.main)
    out = tmp_path / "back"
    printed = call(tmp_path / "folder", out)
    assert f"--init-from {out}" in printed and training_flags(config, config.vocab_size) in printed
    back, restored = opened(out)
    assert back == config
    assert_same_bits(restored, params)
    old, new = load_manifest(checkpoint), load_manifest(out)
    assert (new.kind, new.step, new.tokens, new.data) == ("params", old.step, old.tokens, None)
    assert new.tokenizer == old.tokenizer and new.tree == old.tree
    assert [entry["operation"] for entry in new.lineage] == ["test", "convert", "import"]
    assert new.lineage[-1]["format"] == "mtlm-export"


@pytest.mark.slow
def test_an_export_in_bfloat16_comes_back_rounded(call, tmp_path):
    checkpoint = write_checkpoint(tmp_path / "checkpoint", LLAMA, PARAMS["llama"])
    call(checkpoint, tmp_path / "folder", "--dtype", "bfloat16", main=port_torch.convert.main)
    call(tmp_path / "folder", tmp_path / "back")
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(jnp.float32), PARAMS["llama"])
    assert_same_bits(opened(tmp_path / "back")[1], rounded)


def test_an_export_with_a_file_as_tokenizer(call, tmp_path, tokenizer_file):
    """The folder has its own copy, which does when the original file is gone."""
    record = tokenizer_record(load_tokenizer(tokenizer_file))
    config = dataclasses.replace(LLAMA, vocab_size=record["vocab_size"])
    folder = write_folder(tmp_path / "folder", config, tensors_of(config, random_params(config)))
    shutil.copy(tokenizer_file, folder / "tokenizer.json")
    seal(folder, dataclasses.replace(manifest_of(config), tokenizer=record), EXPORT_MANIFEST)
    call(folder, tmp_path / "a")
    assert load_manifest(tmp_path / "a").tokenizer == record
    tokenizer_file.unlink()
    call(folder, tmp_path / "b")
    assert load_manifest(tmp_path / "b").tokenizer == record | {"name": str(folder / "tokenizer.json")}


@pytest.fixture
def tokenizer_file(tmp_path) -> Path:
    """A small tokenizer.json: single characters."""
    vocabulary = {token: i for i, token in enumerate(["<s>", "</s>", "<unk>", *"abcdefgh "])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, [], unk_token="<unk>"))
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return tmp_path / "tokenizer.json"


# --- stock Llama folders ---


def stock_llama(folder: Path, **settings) -> transformers.LlamaForCausalLM:
    """A Llama that transformers makes and saves, with eps and theta of its own."""
    config = transformers.LlamaConfig(**({
        "vocab_size": 258, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3,
        "num_attention_heads": 4, "max_position_embeddings": 96, "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500_000.0}, "tie_word_embeddings": False,
        "initializer_range": 0.2,
    } | settings))  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(folder)
    return model.eval()


def test_the_scores_of_a_run_around_a_checkpoint_are_not_its_own(tmp_path: Path):
    """An imported checkpoint that happens to lie two folders below a log, whose step 0 is another model's."""
    row = {"step": 0, "kind": "eval", "split": "valid", "tokens": 1}
    scores = {"nll": 2.0, "bits_per_byte": 1.0, "perplexity": 7.0}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(row | scores) + "\n")
    assert held_out_scores(tmp_path / "checkpoints/00000000", 0) == [row | scores]
    assert held_out_scores(tmp_path / "imports/base", 0) == []


@pytest.mark.parametrize(
    "settings", [{}, {"tie_word_embeddings": True}, {"attention_bias": True, "mlp_bias": True}]
)
def test_a_stock_llama_gives_its_own_logits(call, tmp_path, settings):
    model = stock_llama(tmp_path / "folder", **settings)
    call(tmp_path / "folder", tmp_path / "out", "--tokenizer", "bytes")
    config, params = opened(tmp_path / "out")
    assert (config.norm_eps, config.rope_theta) == (1e-5, 500_000.0)
    assert config.tied == settings.get("tie_word_embeddings", False)
    manifest = load_manifest(tmp_path / "out")
    assert (manifest.step, manifest.lineage[0]["format"]) == (0, "llama")
    tokens = np.random.default_rng(0).integers(0, 258, (2, 96), np.int32)
    with torch.no_grad():
        theirs = model(torch.from_numpy(tokens).long()).logits.numpy()
    ours = whole_logits(config, params, jnp.asarray(tokens))
    # As in test_originals: float32 sums in another order, 2e-6 of the largest logit, ten times that allowed.
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-5 * np.abs(theirs).max())


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"num_key_value_heads": 3}, "4 heads of queries for 3 of keys and values"),
        ({"num_key_value_heads": 2}, r"k_proj.weight of shape \[48, 48\] where \[24, 48\]"),
        (
            {"rope_parameters": None, "rope_scaling": {"type": "dynamic", "factor": 2.0}},
            "scaled by 'dynamic'",
        ),
        ({"model_type": "mistral"}, "'mistral' model"),
        ({"hidden_act": "relu"}, "activation 'relu'"),
        ({"num_hidden_layers": 2}, "holds the tensor model.layers.2"),
        ({"num_hidden_layers": 4}, "lacks the tensor model.layers.3"),
        (
            {"intermediate_size": 64},
            r"of shape \[48, 80\] where \[48, 64\]|of shape \[80, 48\] where \[64, 48\]",
        ),
        ({"tie_word_embeddings": False}, "lacks the tensor lm_head.weight"),
        ({"max_position_embeddings": None}, "config.json has no max_position_embeddings"),
    ],
)
def test_llamas_that_do_not_fit(call, tmp_path, fields, sentence):
    folder = write_folder(tmp_path / "folder", LLAMA, tensors_of(LLAMA, PARAMS["llama"]), **fields)
    with pytest.raises(UserError, match=sentence):
        call(folder, tmp_path / "out", "--tokenizer", "bytes")
    assert sorted(tmp_path.iterdir()) == [folder]


def test_what_says_nothing_is_left_out(call, tmp_path):
    """Old versions of transformers saved frequencies, and both names of a tied table."""
    tensors = tensors_of(LLAMA, PARAMS["llama"])
    table = tensors["model.embed_tokens.weight"]
    frequencies = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(6) for i in range(3)}
    folder = write_folder(tmp_path / "a", LLAMA, tensors | frequencies | {"lm_head.weight": table.clone()})
    call(folder, tmp_path / "out", "--tokenizer", "bytes")
    assert_same_bits(opened(tmp_path / "out")[1], PARAMS["llama"])
    loaded = {name: tensor.numpy() for name, tensor in load(folder).state_dict().items()}
    assert np.array_equal(loaded["embed.weight"], table.numpy()) and "head.weight" not in loaded
    folder = write_folder(tmp_path / "b", LLAMA, tensors | {"lm_head.weight": table + 1})
    for opens in (lambda: call(folder, tmp_path / "other", "--tokenizer", "bytes"), lambda: load(folder)):
        with pytest.raises(UserError, match="says that the head is the embedding table, but"):
            opens()


def test_a_padded_vocabulary(call, tmp_path):
    """More rows than the tokenizer has ids, as Qwen's models have them, all the way to another folder."""
    padded = dataclasses.replace(LLAMA, vocab_size=320)
    params = random_params(padded)
    folder = write_folder(tmp_path / "padded", padded, tensors_of(padded, params))
    write_tokenizer(folder, load_tokenizer("bytes"), padded.context)
    printed = call(folder, tmp_path / "out")
    assert "320 rows, 258 token ids" in printed and " --vocab-size 320 " in printed
    config, read = opened(tmp_path / "out")
    assert config.vocab_size == 320
    assert_same_bits(read, params)
    call(tmp_path / "out", tmp_path / "exported", main=port_torch.convert.main)
    exported = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "exported")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "exported")
    assert exported.get_input_embeddings().weight.shape[0] == 320 and len(tokenizer) == 258
    # The loss counts the logits of every row, as transformers does.
    tokens = np.random.default_rng(0).integers(0, 258, (2, 20))
    ids = torch.from_numpy(tokens)
    with torch.no_grad():
        theirs = float(exported(ids, labels=ids).loss)

    @jax.jit
    def nll(params, tokens):
        hidden = forward(config, params, tokens[:, :-1])
        return cross_entropy(hidden, head_table(config, params), tokens[:, 1:], chunk=7).nll

    # float32 sums of 320 terms in another order, of a loss near 6.
    assert float(nll(read, tokens)) / tokens[:, 1:].size == pytest.approx(theirs, abs=2e-5)
    # Fewer rows than ids stay refused.
    few = dataclasses.replace(LLAMA, vocab_size=257)
    folder = write_folder(tmp_path / "few", few, tensors_of(few, random_params(few)))
    write_tokenizer(folder, load_tokenizer("bytes"), few.context)
    with pytest.raises(UserError, match=r"few is a model of 257 token ids, and the tokenizer .* has 258"):
        call(folder, tmp_path / "never")


# --- what is refused, and leaves nothing behind ---


def test_refusals(call, tmp_path):
    folder = write_export(tmp_path / "export", LLAMA, PARAMS["llama"])
    plain = write_folder(tmp_path / "plain", LLAMA, tensors_of(LLAMA, PARAMS["llama"]))
    nan = tensors_of(LLAMA, PARAMS["llama"])
    nan["model.layers.1.mlp.up_proj.weight"][0, 0] = torch.nan
    broken = write_folder(tmp_path / "broken", LLAMA, nan)
    changed = Path(shutil.copytree(folder, tmp_path / "changed"))
    (changed / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-1] + b"\0")
    checkpoint = write_checkpoint(tmp_path / "checkpoint", LLAMA, PARAMS["llama"])
    step = write_checkpoint(tmp_path / "run/checkpoints/00000005", LLAMA, PARAMS["llama"])
    before = sorted(tmp_path.rglob("*"))
    out = tmp_path / "out"
    for arguments, sentence in (
        ((tmp_path / "nothing", out), "is not there"),
        ((tmp_path, out), "has no known format"),
        ((checkpoint, out), "give it to `train_tpu.run --init-from` as it is"),
        ((folder, checkpoint), "exists already"),
        (
            (folder, step.with_name("00000099")),
            "among the checkpoints of the run .*/run, which would",
        ),
        ((folder, out, "--n-heads", "2"), "--n-heads is for the original MTLM1"),
        ((folder, out, "--tokenizer", "mistral"), "the tokenizers differ: .*'bytes'.*'mistral'"),
        ((plain, out), "name the model's tokenizer with --tokenizer"),
        (
            (plain, out, "--tokenizer", "mistral"),
            "model of 258 token ids, and the tokenizer 'mistral' has 32000",
        ),
        ((broken, out, "--tokenizer", "bytes"), "layers.1.mlp.up_proj.weight in .* has NaN"),
        ((changed, out), "model.safetensors does not match its sha256"),
    ):
        with pytest.raises(UserError, match=sentence):
            call(*arguments)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_tokenizer_that_gives_other_ids_is_refused(call, tmp_path, tokenizer_file):
    n = load_tokenizer(tokenizer_file).vocab_size
    config = dataclasses.replace(LLAMA, vocab_size=n)
    folder = write_folder(tmp_path / "folder", config, tensors_of(config, random_params(config)))
    content = json.loads(tokenizer_file.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (folder / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="does not give the ids of"):
        call(folder, tmp_path / "out", "--tokenizer", tokenizer_file)
    call(folder, tmp_path / "out")
    assert load_manifest(tmp_path / "out").tokenizer["name"] == str(folder / "tokenizer.json")


def test_the_flags_make_the_model():
    assert training_flags(preset("mtlm2-40m"), 32_000) == "--preset mtlm2-40m"
    original = dataclasses.replace(preset("mtlm1-88m"), d_mlp=1280)
    assert training_flags(original, original.vocab_size) == "--preset mtlm1-88m --d-mlp 1280"
    ungrouped = dataclasses.replace(preset("smollm2-135m"), n_kv_heads=9, vocab_size=49_280)
    flags = "--preset smollm2-135m --n-kv-heads 9 --vocab-size 49280"
    assert training_flags(ungrouped, 49_152) == flags
    assert model_config(cli.parse(RunConfig, flags.split(), prog=""), 49_152) == ungrouped


# --- the originals, from the command to training ---

TRAINING = ("--steps", "2", "--batch", "4", "--log-every", "1", "--prompts", "a")


@pytest.fixture(scope="module")
def prepared(text, tmp_path_factory) -> Path:
    """The tests' text as windows of 32 bytes."""
    out = tmp_path_factory.mktemp("prepared") / "data"
    run_here(text, "--tokenizer", "bytes", "--context", "32", "--out", out, module="train_tpu.prepare")
    return out


def import_by_command(*arguments: str | Path) -> list[str]:
    """Runs the import; gives the flags that it prints for training."""
    printed, err = run_here(*arguments, "--tokenizer", "bytes", module="port_torch.import_checkpoint")
    assert not err
    command = printed.splitlines()[-1].split()
    return command[command.index("--init-from") : command.index("--data")]


def assert_first_loss(folder: Path, prepared: Path, scores: Callable[[np.ndarray], np.ndarray]) -> None:
    """The first evaluation of a run is the loss that the original's own logits [B, S, V] have."""
    row = read_log(folder, "eval")[0]
    windows, counted = heldout_windows(open_dataset(prepared), row["split"])
    tokens = windows.astype(np.int32)
    log_p = scipy.special.log_softmax(scores(tokens[:, :-1]).astype(np.float64), axis=-1)
    nll = -np.take_along_axis(log_p, tokens[:, 1:, None], axis=-1)[..., 0][counted].mean()
    # A mean of losses, each from logits that are off by 2e-6 of about 5.
    assert row["step"] == 0 and row["nll"] == pytest.approx(nll, abs=2e-5)


@pytest.mark.slow
def test_an_original_mtlm1_trains_here(prepared, tmp_path):
    weights = mtlm1_weights(258, 64, 2, 128, std=0.1)
    torch.save({"model": weights, "step": 9}, tmp_path / "original.pt")
    out, trained = tmp_path / "imported", tmp_path / "run"
    unknown = ("--n-heads", "2", "--context", "32")
    flags = import_by_command(tmp_path / "original.pt", out, *unknown)
    common = (*flags, "--data", prepared, "--out", trained, *TRAINING)
    # What no shape shows is refused all the same, with the flags that are right.
    message = refusal_here(*common, "--n-heads", "4")
    assert (
        "is a model with n_heads 2, not 4" in message
        and training_flags(opened(out)[0], opened(out)[0].vocab_size) in message
    )
    message = refusal_here(*common, "--rope-theta", "5000")
    assert "is a model with rope_theta 10000.0, not 5000.0" in message
    assert not trained.exists()
    started, _ = run_here(*common)
    assert f"from the parameters of {out}" in started
    lineage = load_manifest(find_step(trained)).lineage
    assert [entry["operation"] for entry in lineage] == ["import", "init_from"]
    assert lineage[0]["format"] == "mtlm1-torch"
    assert [row["step"] for row in read_log(trained, "train")] == [0, 1]
    assert_first_loss(trained, prepared, lambda tokens: mtlm1_logits(weights, tokens, 2))


@pytest.mark.slow
def test_an_original_mtlm2_trains_here(prepared, tmp_path):
    state = mtlm2_state(TinyGPT(258, 32, 48, 2, 4), std=0.1)
    with ocp.CheckpointManager(tmp_path / "original") as manager:
        manager.save(5, args=ocp.args.StandardSave(state))
    trained = tmp_path / "run"
    flags = import_by_command(tmp_path / "original", tmp_path / "imported")
    run_here(*flags, "--data", prepared, "--out", trained, *TRAINING)
    variables = {"params": state.params}
    assert_first_loss(
        trained, prepared, lambda tokens: np.asarray(jax.jit(state.apply_fn)(variables, tokens))
    )
