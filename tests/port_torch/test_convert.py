"""The command: what it writes, what it refuses, and that nothing half-written stays."""

import dataclasses
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors import safe_open

from core.checkpoint.checkpointer import save_params
from core.checkpoint.manifest import EXPORT_MANIFEST, load_manifest
from core.errors import UserError
from port_torch import conversion, convert, export
from port_torch import parity as probe
from port_torch.flax_parity import flax_logits
from port_torch.folder import open_folder
from port_torch.hf_config import hf_config, model_config
from port_torch.hub import push
from port_torch.model import load
from port_torch.names import exported_tensors
from tests.models import random_params
from tests.port_torch.folders import SMALL, manifest_of, tensors_of, write_checkpoint
from tests.port_torch.test_model import MIXED
from tests.port_torch.trained import open_run, transformers_model
from tests.train_tpu.processes import refusal_here, run

NAMES = {
    "LICENSE", "README.md", "config.json", "generation_config.json", "model.safetensors",
    "mtlm_manifest.json", "tokenizer.json", "tokenizer_config.json",
}  # fmt: skip
CODE = {"configuration_mtlm.py", "modeling_mtlm.py"}


def run_here(monkeypatch, *arguments) -> None:
    """The command in this process."""
    monkeypatch.setattr("sys.argv", ["convert", *map(str, arguments)])
    convert.main()


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_the_folder(trained: Path, exported: Path):
    config, params = open_run(trained)
    llama = config.mlp == "swiglu"
    assert names_in(exported) == NAMES | (set() if llama else CODE)
    hf = transformers_model(exported)
    assert type(hf).__name__ == ("LlamaForCausalLM" if llama else "MtlmForCausalLM")
    assert hf.generation_config.eos_token_id == 257
    with safe_open(exported / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    # Every tensor to the bit, and none besides.
    folder = open_folder(exported)
    expected = tensors_of(config, params)
    assert folder.tensors.keys() == expected.keys() == exported_tensors(config).keys()
    assert all(torch.equal(folder.read(name), tensor) for name, tensor in expected.items())
    # The manifest goes on from the checkpoint's.
    manifest = load_manifest(exported, EXPORT_MANIFEST)
    assert (manifest.kind, manifest.step, manifest.lineage[-1]["operation"]) == ("params", 40, "convert")
    assert manifest.files.keys() == names_in(exported) - {EXPORT_MANIFEST, "README.md"}
    assert str(trained.parent) not in (exported / EXPORT_MANIFEST).read_text()  # nobody's paths


def test_the_card(trained: Path, exported: Path):
    from huggingface_hub import ModelCard

    card = ModelCard.load(exported / "README.md")
    config, _ = open_run(trained)
    rows = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    last = [row for row in rows if row["kind"] == "eval"][-1]
    results = {r.metric_type: r.metric_value for r in card.data.eval_results}
    assert results == {name: last[name] for name in ("bits_per_byte", "nll", "perplexity")}
    for told in (f"{config.n_params:,}", "| updates | 40 |", "text.jsonl, fingerprint"):
        assert told in card.content, told
    assert str(trained.parent) not in card.content  # nobody's paths
    assert ("trust_remote_code" in card.content) == (config.mlp != "swiglu")


def test_paths_are_nobodys():
    """Of whatever setting holds one, several of them included; names on the Hub stay."""
    run = {
        "data": ["/home/me/a.txt", "hf:a/b"],
        "template": "/home/me/t.jinja",
        "eval_data_dir": "/home/me/sets",
    }
    lineage = [{"operation": "init_from", "path": "/home/me/runs/base/checkpoints/00000007"}]
    manifest = manifest_of(SMALL["llama"])
    manifest = dataclasses.replace(manifest, config=manifest.config | {"run": run}, lineage=lineage)
    written = export.without_local_paths(manifest).to_json()
    assert "/home" not in written and "base/checkpoints/00000007" in written
    assert all(f'"{name}"' in written for name in ("a.txt", "hf:a/b", "t.jinja", "sets"))


def test_the_lines_of_the_card_and_a_pipeline_of_batches(exported: Path, monkeypatch, capsys):
    """As a user types them; nothing is asked on stdin, and a batch continues as each prompt does alone."""
    from transformers import AutoTokenizer, pipeline

    asked = []
    monkeypatch.setattr("builtins.input", lambda *_: asked.append(1) or "n")
    card = (exported / "README.md").read_text()
    code = re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]
    exec(code.replace("FOLDER", repr(str(exported))), {})
    assert capsys.readouterr().out.startswith("<s>This function returns") and not asked

    hf, tokenizer = (
        transformers_model(exported),
        AutoTokenizer.from_pretrained(exported, trust_remote_code=True),
    )
    generate = pipeline("text-generation", model=hf, tokenizer=tokenizer)
    prompts = ["Document 1", "th", "a longer prompt than the others"]
    options = {"max_new_tokens": 8, "do_sample": False}
    alone = [generate(prompt, **options)[0]["generated_text"] for prompt in prompts]
    together = generate(prompts, batch_size=3, **options)
    assert [row[0]["generated_text"] for row in together] == alone


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float16", marks=pytest.mark.slow)])
def test_narrow_types_and_shards(tmp_path: Path, monkeypatch, capsys, dtype: str):
    config = SMALL["gpt"]
    params = random_params(config)
    source = write_checkpoint(tmp_path / "source", config, params)
    run_here(monkeypatch, source, tmp_path / "out", "--dtype", dtype, "--max-shard-size", "60KB")
    assert f"{dtype} weights move the logits by up to" in capsys.readouterr().out
    shards = sorted((tmp_path / "out").glob("model-*.safetensors"))
    assert len(shards) == 3 and all(shard.stat().st_size < 100_000 for shard in shards)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {shard.name for shard in shards}
    folder = open_folder(tmp_path / "out")
    for name, tensor in tensors_of(config, params, getattr(torch, dtype)).items():
        assert torch.equal(folder.read(name), tensor), name
    assert names_in(tmp_path / "out") > CODE
    assert "trust_remote_code" in (tmp_path / "out" / "README.md").read_text()
    hf = transformers_model(tmp_path / "out")
    assert type(hf).__name__ == "MtlmForCausalLM" and hf.config.dtype == torch.float32  # as asked for
    assert load(tmp_path / "out", torch.bfloat16).embed.weight.dtype == torch.bfloat16


@pytest.mark.parametrize(
    "kind",
    [pytest.param(kind, marks=[pytest.mark.slow] * (kind != "relu2")) for kind in MIXED],
)
def test_every_mixture_of_parts_is_exported(tmp_path: Path, monkeypatch, kind: str):
    import dataclasses

    config = dataclasses.replace(MIXED[kind], vocab_size=258, rope_theta=5000.0, norm_eps=1e-5)
    source = write_checkpoint(tmp_path / "source", config, random_params(config))
    run_here(monkeypatch, source, tmp_path / "out")
    assert model_config(open_folder(tmp_path / "out").config) == config


def test_config_is_read_back_and_refused_where_it_does_not_fit():
    for config in SMALL.values():
        assert model_config(hf_config(config, 256, 257, "float32")) == config
    given = hf_config(SMALL["llama"], 256, 257, "float32")
    for change, told in (
        ({"num_key_value_heads": 3}, "no multiple"),
        ({"hidden_act": "relu"}, "activation 'relu'"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope scaling yarn needs factor=NUMBER"),
        ({"mlp_bias": True}, "biases in one of"),
        ({"hidden_size": None}, "no hidden_size"),
        ({"model_type": "gpt2"}, "'gpt2' model"),
        ({"head_dim": 9}, "even head size, not 9"),
    ):
        with pytest.raises(UserError, match=told):
            model_config(given | change)


def test_refusals(tmp_path: Path, monkeypatch):
    config = SMALL["llama"]
    source = write_checkpoint(tmp_path / "source", config, random_params(config))
    out = tmp_path / "out"
    there = tmp_path / "there"
    there.mkdir()
    bad = random_params(config)
    bad["layers"]["attn"]["q"]["kernel"] = bad["layers"]["attn"]["q"]["kernel"].at[1, 2, 3].set(np.nan)
    nan = write_checkpoint(tmp_path / "nan", config, bad)
    big = random_params(config)
    big["norm"]["scale"] = big["norm"]["scale"].at[0].set(1e6)
    big = write_checkpoint(tmp_path / "big", config, big)
    for arguments, told in (
        ((source, there), "there exists already"),
        ((source, out, "--dry-run"), "give --push-to-hub"),
        ((source, out, "--private"), "give --push-to-hub"),
        ((source, out, "--push-to-hub", "me"), "'me' is no name on the Hub: give user/name"),
        ((source, out, "--max-shard-size", "big"), "not a size"),
        ((source, out, "--tokenizer", "mistral"), "tokenizers differ"),
        ((nan, out), "layers/attn/q/kernel holds 1 values that are NaN"),
        ((big, out, "--dtype", "float16"), "norm/scale holds 1 values"),
        ((tmp_path / "none", out), "no checkpoint in"),
    ):
        with pytest.raises(UserError, match=told):
            run_here(monkeypatch, *arguments)
        assert names_in(tmp_path) == {"source", "there", "nan", "big"}


def test_a_refusal_is_one_sentence(tmp_path: Path):
    assert "no checkpoint in" in refusal_here(tmp_path / "a", tmp_path / "b", module="port_torch.convert")


def test_what_computes_something_else_is_removed(tmp_path: Path, monkeypatch):
    """A wrong theta, as of a folder whose config says nothing of it."""
    config = SMALL["llama"]
    source = write_checkpoint(tmp_path / "source", config, random_params(config))
    monkeypatch.setattr(export, "hf_config", lambda *given: hf_config(*given) | {
        "rope_theta": 9000.0, "rope_parameters": {"rope_type": "default", "rope_theta": 9000.0}
    })  # fmt: skip
    with pytest.raises(UserError, match=r"differ from Flax's by up to .* the folder was removed"):
        run_here(monkeypatch, source, tmp_path / "out")
    assert names_in(tmp_path) == {"source"}


def test_tolerance_tells_a_wrong_model_from_rounding(tmp_path: Path, monkeypatch):
    """The limit lies far above what is measured and far below what one wrong setting changes."""
    import dataclasses

    config = SMALL["llama"]
    params = random_params(config)
    run_here(monkeypatch, write_checkpoint(tmp_path / "source", config, params), tmp_path / "out")
    tokens = probe.probe_tokens(config, 256)
    right = flax_logits(config, params, tokens)
    with torch.inference_mode():
        _, noise = probe.mirror_logits(tmp_path / "out", torch.from_numpy(tokens))
    for change in ({"rope_theta": 9900.0}, {"norm_eps": 1e-3}):
        wrong = flax_logits(dataclasses.replace(config, **change), params, tokens)
        assert np.abs(wrong - right).max() > 20 * probe.tolerance(config, right, noise)


def test_killed_on_the_way_nothing_has_the_name(tmp_path: Path, monkeypatch):
    """Whatever stops it before the renaming leaves no folder; what a kill left is replaced."""
    config = SMALL["llama"]
    source = write_checkpoint(tmp_path / "source", config, random_params(config))
    for module, step in ((conversion, "write_weights"), (export, "seal"), (conversion, "compare")):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(module, step, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
            run_here(patch, source, tmp_path / "out")
        assert names_in(tmp_path) == {"source"}
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / "rest").write_text("of a killed process")
    run_here(monkeypatch, source, tmp_path / "out")
    assert names_in(tmp_path) == {"source", "out"} and "rest" not in names_in(tmp_path / "out")


def test_dry_run_and_upload(tmp_path: Path, monkeypatch, capsys):
    config = SMALL["llama"]
    source = write_checkpoint(tmp_path / "source", config, random_params(config))
    uploads, failures = [], [OSError("no route to host")]

    class Api:
        def create_repo(self, name, private, exist_ok):
            uploads.append((name, private, exist_ok))

        def model_info(self, name):
            return SimpleNamespace(private=name == "me/hidden")

        def upload_folder(self, **given):
            uploads.append(given["folder_path"])
            raise failures[-1]

    monkeypatch.setattr("port_torch.hub.HfApi", Api)
    out = tmp_path / "the model"
    run_here(monkeypatch, source, out, "--push-to-hub", "me/model", "--dry-run")
    said = capsys.readouterr().out
    size = (out / "model.safetensors").stat().st_size
    assert not uploads and f"{size:,}  model.safetensors" in said
    assert shlex.split(said.strip().rpartition("upload them: ")[2]) == ["hf", "upload", "me/model", str(out)]
    with pytest.raises(UserError, match=r"is complete, but was not uploaded \(no route to host\)"):
        run_here(monkeypatch, source, tmp_path / "two", "--push-to-hub", "me/model")
    assert uploads == [("me/model", None, True), tmp_path / "two"] and names_in(tmp_path / "two") >= NAMES
    failures.append(type("ConnectError", (Exception,), {})())  # as httpx has it, which is no OSError
    with pytest.raises(UserError, match=r"was not uploaded \(ConnectError\)"):
        push(tmp_path / "two", "me/model", private=False, dry_run=False)
    failures.pop()
    # With --private: a repository made now, one that is there and private, one that is there and public.
    uploads.clear()
    with pytest.raises(UserError, match="no route to host"):
        push(tmp_path / "two", "me/hidden", private=True, dry_run=False)
    assert uploads == [("me/hidden", True, True), tmp_path / "two"]
    with pytest.raises(UserError, match="me/model exists on the Hub and is public, not private"):
        push(tmp_path / "two", "me/model", private=True, dry_run=False)
    assert uploads[2:] == [("me/model", True, True)]


@pytest.mark.slow
def test_the_training_half_needs_no_torch():
    code = "import sys, train_tpu.run, core.generate; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2]).returncode == 0


@pytest.mark.slow
def test_200m_takes_at_most_two_and_a_half_times_its_weights(tmp_path: Path, cache: Path):
    """Memory above the process after its imports, as the command itself prints it."""
    import dataclasses

    import jax

    from core.config import preset
    from core.model import init_params

    config = dataclasses.replace(
        preset("mtlm1-200m"), vocab_size=258
    )  # the tokenizer is not what is measured
    config = dataclasses.replace(config, d_mlp=2176 + 440)  # as many parameters as with 32,000 ids
    save_params(tmp_path / "source", init_params(config, jax.random.key(0)), manifest_of(config))
    for dtype in ("float32", "bfloat16"):
        out, _ = run(
            cache, tmp_path / "source", tmp_path / dtype, "--dtype", dtype, module="port_torch.convert"
        )
        print(out)
        memory, weights = re.search(r"([0-9,]+) MB peak memory .* ([0-9,.]+) MB\)", out).groups()
        assert float(memory.replace(",", "")) <= 2.5 * float(weights.replace(",", ""))
