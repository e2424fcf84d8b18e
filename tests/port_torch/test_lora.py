"""LoRA in the mirror against `peft` and its formula; adapters saved, opened by peft, merged and refused."""

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

import port_torch.convert
import port_torch.merge
from core.checkpoint.checkpointer import save_tree
from core.checkpoint.manifest import EXPORT_MANIFEST, load_manifest
from core.config import ModelConfig
from core.errors import UserError
from core.lora import MAPS, LoraConfig
from core.model import Adapter, forward, logits
from core.run.settings import flatten
from core.tokenizer import load_tokenizer
from port_torch.adapter_export import Trained, write_adapter
from port_torch.folder import weights_hash
from port_torch.model import Decoder, decoder_of, load, parameter_name
from port_torch.names import exported_tensors
from port_torch.parity import probe_tokens, tolerance
from port_torch.training.lora import adapters_of, add_adapters, merged
from tests.models import BOTH, GROUPED, random_params
from tests.port_torch.folders import SMALL, manifest_of, tensors_of, write_checkpoint, write_export
from tests.port_torch.small_training import call, theirs_of
from train_tpu.lora import init_adapters, module_of
from train_tpu.lora import merged as merged_in_jax

MODELS = {**BOTH, "grouped": GROUPED}


class Saved(NamedTuple):
    """Adapters in a folder."""

    config: ModelConfig
    base: Path
    folder: Path
    trained: Decoder


def decoder(kind: str) -> Decoder:
    config = MODELS[kind]
    tensors = tensors_of(config, random_params(config, std=0.1))
    return decoder_of(config, {parameter_name(p): tensors[n] for n, p in exported_tensors(config).items()})


def trained_in(model: Decoder) -> dict[str, torch.Tensor]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("kind", MODELS)
def test_adapters_are_those_of_peft(kind: str):
    """Names, first values, outputs and gradients under dropout: equal to the bit."""
    config = LoraConfig(
        lora_rank=3,
        lora_alpha=5.0,
        lora_dropout=0.3,
        lora_targets=("attention", "down"),
    )
    ours, theirs = decoder(kind), decoder(kind)
    add_adapters(ours, config, seed=7)
    torch.manual_seed(7)
    targets = ["q", "k", "v", "o", "down"]
    settings = peft.LoraConfig(r=3, lora_alpha=5.0, lora_dropout=0.3, target_modules=targets)
    peft.inject_adapter_in_model(settings, theirs)
    assert list(trained_in(ours)) == list(trained_in(theirs))
    tokens = torch.arange(60)[None] % 97
    for model in (ours, theirs):
        torch.manual_seed(8)
        with torch.no_grad():
            for name, p in trained_in(model).items():
                if ".lora_B." in name:
                    p.normal_(0, 0.1)
        model.train().logits(model(tokens)).square().sum().backward()
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert torch.equal(p, q) and p.requires_grad is q.requires_grad, name
        assert p.grad is None or torch.equal(p.grad, q.grad), name


@pytest.mark.parametrize("kind", MODELS)
def test_adapters_merge_to_what_their_formula_says(kind: str):
    plain, adapted = decoder(kind), decoder(kind)
    add_adapters(adapted, LoraConfig(lora_rank=4, lora_alpha=12.0, lora_dropout=0.5), seed=1)
    tokens = torch.arange(64)[None] % 97
    adapted.eval()
    assert torch.allclose(adapted(tokens), plain(tokens), atol=1e-5)  # at first they add nothing
    trained = trained_in(adapted)
    maps = 6 if kind == "gpt" else 7
    assert len(trained) == 2 * maps * 3 and all(".lora_" in name for name in trained)
    with torch.no_grad():
        for p in trained.values():
            p.normal_(0, 0.05)
    expected = {name: weight.clone() for name, weight in plain.state_dict().items()}
    for name, a in trained.items():
        if ".lora_A." in name:
            b = trained[name.replace("lora_A", "lora_B")]
            expected[name.replace(".lora_A.default", "")] += 12.0 / 4 * b.detach() @ a.detach()
    found = merged(adapted)
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        assert torch.allclose(found[name], weight, atol=1e-6), name
    whole = decoder_of(MODELS[kind], found)
    ours, theirs = whole.logits(whole(tokens)), adapted.logits(adapted(tokens))
    assert (theirs - plain.logits(plain(tokens))).abs().max() > 0.5
    assert torch.allclose(ours, theirs, atol=1e-4)


@pytest.fixture(scope="module", params=["llama", "gpt"])
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """A base, adapters of the mirror for it as `write_adapter` saves them, and what the mirror computes."""
    root = tmp_path_factory.mktemp(request.param)
    config = SMALL[request.param]
    base = write_export(root / "base", config, random_params(config, std=0.1))
    adapted = load(base)
    lora = LoraConfig(lora_rank=3, lora_alpha=7.5, lora_dropout=0.4, lora_targets=("q", "o", "mlp"))
    add_adapters(adapted, lora, seed=1)
    with torch.no_grad():
        for p in trained_in(adapted).values():
            p.normal_(0, 0.05)
    folder = root / "adapter"
    folder.mkdir()
    adapted.eval()
    ids = probe_tokens(config, 256)
    with torch.inference_mode():
        logits = adapted.logits(adapted(torch.from_numpy(ids))).numpy()
    trained = Trained(
        config, lora, adapters_of(adapted), base, weights_hash(base), load_file(base / "model.safetensors"),
        ids, logits, "the mirror",
    )  # fmt: skip
    write_adapter(folder, trained, load_tokenizer("bytes"), manifest_of(config), "export")
    return Saved(config, base, folder, adapted)


def test_peft_computes_what_was_trained(saved: Saved):
    """Opened as its users open it, and merged: the logits of the trained model within float32's error."""
    ids = torch.from_numpy(probe_tokens(saved.config, 256))
    with torch.inference_mode():
        expected = saved.trained.logits(saved.trained(ids)).numpy()
        model = peft.PeftModel.from_pretrained(theirs_of(saved.base, saved.config), saved.folder).eval()
        found = model(ids, use_cache=False).logits.numpy()
        exact = decoder_of(saved.config, {n: w.double() for n, w in merged(saved.trained).items()})
        noise = float(np.abs(exact.logits(exact(ids)).numpy() - expected).max())
        plain = load(saved.base)
        before = plain.logits(plain(ids)).numpy()
    limit = tolerance(saved.config, expected, noise)
    assert np.abs(found - expected).max() <= limit < 0.01 < np.abs(before - expected).max()
    names = {name.rpartition(".")[2] for name in model.targeted_module_names}
    gate = {"gate_proj"} if saved.config.mlp == "swiglu" else set()
    assert names == {"q_proj", "o_proj", "up_proj", "down_proj"} | gate
    assert json.loads((saved.folder / "adapter_config.json").read_text())["task_type"] == "CAUSAL_LM"


@pytest.mark.parametrize("kind", ["llama", pytest.param("gpt", marks=pytest.mark.slow)])
def test_peft_computes_what_jax_trained(kind: str, tmp_path: Path, monkeypatch, capsys):
    """A checkpoint of adapters, converted for its base; against core.model with base and adapters apart. On
    another base, on weights that are off by one rounding, and without adapters it is refused."""
    config, lora = SMALL[kind], LoraConfig(lora_rank=3, lora_alpha=7.5, lora_targets=("q", "o", "mlp"))
    params = random_params(config, std=0.1)
    adapters = init_adapters(lora, config, 0)
    for name in lora.targets(config):
        b = module_of(adapters, MAPS[name].module)["lora_b"]
        module_of(adapters, MAPS[name].module)["lora_b"] = 0.05 * jax.random.normal(
            jax.random.key(1), b.shape
        )
    run = {"data": "rows.jsonl", "init_from": "runs/base", **flatten(lora)}
    entry = {"operation": "finetune", "path": "runs/base/checkpoints/00000009", "form": "chat"}
    manifest = dataclasses.replace(manifest_of(config), lineage=[entry])
    manifest = dataclasses.replace(manifest, config=manifest.config | {"run": run})
    whole = {"params": merged_in_jax(lora, config, params, adapters), "adapters": adapters}
    start = save_tree(tmp_path / "start", whole, manifest)
    base = write_export(tmp_path / "base", config, params)
    folder = tmp_path / "adapter"
    assert call(monkeypatch, port_torch.convert, start, folder, "--adapter-for", base) == 0
    ids = probe_tokens(config, 256)
    paths = [MAPS[name].module for name in lora.targets(config)]
    pairs = {path: module_of(adapters, path) for path in paths}
    apart = {path: Adapter(pair["lora_a"], pair["lora_b"] * 2.5) for path, pair in pairs.items()}
    expected = np.asarray(logits(config, params, forward(config, params, jnp.asarray(ids), adapters=apart)))
    with torch.inference_mode():
        model = peft.PeftModel.from_pretrained(theirs_of(base, config), folder).eval()
        found = model(torch.from_numpy(ids), use_cache=False).logits.numpy()
        exact = model.merge_and_unload().double()(torch.from_numpy(ids), use_cache=False).logits.numpy()
    # Merging into float32 rounds once more than either: less than the sums behind it do.
    limit = tolerance(config, expected, float(np.abs(exact - expected).max()))
    assert np.abs(found - expected).max() <= limit < 0.01
    assert "LoRA adapters of rank 3, at q, o" in capsys.readouterr().out
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == str(base)
    lineage = load_manifest(folder, EXPORT_MANIFEST).lineage
    assert lineage[0]["path"] == "base/checkpoints/00000009"
    assert (lineage[-1]["operation"], lineage[-1]["base_sha256"]) == ("convert", weights_hash(base))
    table = params["embed"]["table"]
    rounded = params | {"embed": params["embed"] | {"table": table.at[5, 3].multiply(1 + 2**-23)}}
    advice = "give the folder that .* of runs/base"
    others = {
        "rounded": (config, rounded, f"embed_tokens.weight is another one: {advice}"),
        "deeper": (dataclasses.replace(config, n_layers=4), None, "a model with n_layers 4, not 3"),
        "adapted": (config, whole["params"], "_proj.weight is another one"),
    }
    for name, (other, weights, message) in others.items():
        wrong = write_export(tmp_path / name, other, weights or random_params(other))
        with pytest.raises(UserError, match=f"was not trained on the weights of .*{message}"):
            call(monkeypatch, port_torch.convert, start, tmp_path / "no", "--adapter-for", wrong)
    for source, options, message in (
        (write_checkpoint(tmp_path / "plain", config, params), (base,), "holds no adapters"),
        (start, (start,), "export it first"),
        (start, (tmp_path / "none",), r"is not there: make it with .*\.convert runs/base .*none"),
        (start, (base, "--dtype", "float16"), "are not for adapters"),
        (start, (base, "--push-to-hub", "me/adapter"), "upload that first"),
    ):
        with pytest.raises(UserError, match=message):
            call(monkeypatch, port_torch.convert, source, tmp_path / "no", "--adapter-for", *options)
    assert not (tmp_path / "no").exists()


def test_merging_gives_the_trained_weights(saved: Saved, tmp_path: Path, monkeypatch, capsys):
    out = tmp_path / "out"
    assert call(monkeypatch, port_torch.merge, saved.folder, out) == 0
    assert "against peft" in capsys.readouterr().out
    found, expected = load(out).state_dict(), merged(saved.trained)
    for name, weight in expected.items():
        # One product of rank 3 and one sum: a rounding each, of values below 1.
        assert torch.allclose(found[name], weight, rtol=0, atol=4 * 2**-24), name
    lineage = load_manifest(out, EXPORT_MANIFEST).lineage
    assert [entry["operation"] for entry in lineage] == ["test", "export", "merge"]


def test_an_adapter_of_peft_alone_is_merged_and_its_doubt_said(
    saved: Saved, tmp_path: Path, monkeypatch, capsys
):
    """Saved by peft, with what our settings have not: rslora, and a rank of its own for one map."""
    theirs = theirs_of(saved.base, saved.config)
    settings = peft.LoraConfig(
        r=4, target_modules=["v_proj", "up_proj"], use_rslora=True, rank_pattern={"up_proj": 2},
        task_type="CAUSAL_LM", init_lora_weights=False,
    )  # fmt: skip
    model = peft.get_peft_model(theirs, settings).eval()
    model.save_pretrained(tmp_path / "theirs")
    ids = torch.arange(50)[None]
    with torch.inference_mode():
        expected = model(ids, use_cache=False).logits
    out = tmp_path / "out"
    call(monkeypatch, port_torch.merge, tmp_path / "theirs", out, "--base", saved.base)
    assert "has no hash of the weights that it was trained on" in capsys.readouterr().err
    merged_here = load(out)
    assert torch.allclose(merged_here.logits(merged_here(ids)), expected, atol=1e-4)


def test_an_adapter_that_unties_the_head_is_not_merged(tmp_path: Path, monkeypatch):
    config = dataclasses.replace(SMALL["llama"], tied=True)
    base = write_export(tmp_path / "base", config, random_params(config, std=0.1))
    settings = peft.LoraConfig(
        r=2, target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(theirs_of(base, config), settings)
    torch.nn.init.normal_(model.get_output_embeddings().weight)
    model.save_pretrained(tmp_path / "theirs")
    with pytest.raises(UserError, match=r"changes lm_head, and in .*base embedding and head are one matrix"):
        call(monkeypatch, port_torch.merge, tmp_path / "theirs", tmp_path / "out", "--base", base)
    assert not (tmp_path / "out").exists()


def test_what_is_not_merged(saved: Saved, tmp_path: Path, monkeypatch):
    def refused(adapter: Path, message: str, *options: str | Path) -> None:
        with pytest.raises(UserError, match=message):
            call(monkeypatch, port_torch.merge, adapter, tmp_path / "out", *options)
        assert not (tmp_path / "out").exists()

    other = write_export(tmp_path / "other", saved.config, random_params(saved.config, seed=5))
    refused(saved.folder, "was trained on other weights than those of .*other: give", "--base", other)
    refused(saved.base, "is no LoRA adapter")
    refused(tmp_path / "none", "is not there")
    bare = shutil.copytree(saved.folder, tmp_path / "bare")
    (bare / EXPORT_MANIFEST).unlink()
    named = (bare / "adapter_config.json").read_text()
    for gone in ("/nowhere/base", "./base", "base", "runs/base/export"):  # none is OWNER/NAME on the Hub
        changed = json.loads(named) | {"base_model_name_or_path": gone}
        (bare / "adapter_config.json").write_text(json.dumps(changed))
        refused(bare, f"the base of .*, {gone}, is not there: give it with --base")
    (bare / "adapter_config.json").write_text(named)
    narrow = dataclasses.replace(saved.config, d_mlp=40)
    small = write_export(tmp_path / "narrow", narrow, random_params(narrow))
    refused(bare, "does not fit its base, by what peft says: .*size mismatch", "--base", small)
    tensors = load_file(bare / "adapter_model.safetensors")
    first = next(iter(tensors))
    save_file(tensors | {first: tensors[first] * float("nan")}, bare / "adapter_model.safetensors")
    refused(bare, f"{first}.* has NaN")
    save_file({name: t for name, t in tensors.items() if name != first}, bare / "adapter_model.safetensors")
    refused(bare, f"lacks the tensor {first}")
    (bare / "adapter_config.json").write_text('{"peft_type": "IA3"}')
    refused(bare, "adapters of the kind 'IA3'")
    damaged = shutil.copytree(saved.folder, tmp_path / "damaged")
    content = bytearray((damaged / "adapter_model.safetensors").read_bytes())
    content[-1] ^= 1
    (damaged / "adapter_model.safetensors").write_bytes(content)
    refused(damaged, "does not match its sha256")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    refused(saved.folder, "with peft: pip install")
    with pytest.raises(UserError, match="with peft: pip install"):
        add_adapters(load(saved.base), LoraConfig(lora_rank=2), 0)


@pytest.mark.slow
def test_the_first_update_waits_for_none_of_what_it_does_not_need(tmp_path: Path):
    """Each takes seconds; what needs them, such as the proof of the result, imports them later. Documents are
    placed as for a GPU, too."""
    base = write_export(tmp_path / "base", SMALL["llama"], random_params(SMALL["llama"], std=0.1))
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "response": "b"}\n' * 4)
    code = """
import sys, numpy, torch, port_torch.finetune, port_torch.training.trainer as trainer
from core.data.sequences import Rows
from port_torch.training.batches import place
ids = numpy.zeros((1, 8), numpy.int32)
list(place(Rows(ids, ids, ids), torch.device("cpu"), by_lengths=True).micro_batches())
slow = {"jax", "peft", "transformers", "torch._dynamo", "orbax.checkpoint", "matplotlib"}
trainer.report_end = lambda *_: print(slow & set(sys.modules))
port_torch.finetune.main()
"""
    command = [sys.executable, "-c", code, base, "--data", tmp_path / "rows.jsonl", "--out", tmp_path / "out"]
    ended = subprocess.run(
        [*command, "--steps", "1", "--batch", "1", "--lora-rank", "2"], capture_output=True, text=True
    )
    assert ended.stdout.splitlines()[-1] == "set()", ended
