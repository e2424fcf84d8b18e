"""The exported folders on transformers 4.57.3, in its own environment: logits, greedy text, tokenizer."""

import json
import os
import site
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from core.tokenizer import load_tokenizer
from port_torch.hf_tokenizer import write_tokenizer
from port_torch.model_folder import open_model
from tests.models import random_tokens
from tests.port_torch.folders import write_folder
from tests.port_torch.test_field_models import MODELS, close, make, tokens_of
from tests.port_torch.test_hf_tokenizer import expected_of
from tests.port_torch.test_model import flax_logits
from tests.port_torch.texts import fuzzed_texts
from tests.port_torch.trained import open_run, transformers_logits, transformers_model

pytestmark = pytest.mark.slow
RELEASE = "4.57.3"
# The newest `datasets` ask for a newer hub, and `Trainer` imports it where it is installed.
PINS = (f"transformers=={RELEASE}", "tokenizers==0.22.2", "huggingface_hub==0.36.0", "datasets==3.6.0")
TESTS = Path(__file__).parent

MODEL_PROGRAM = """
import sys, numpy as np, torch, transformers
from transformers import AutoModelForCausalLM
if transformers.__version__ != sys.argv[4]:
    sys.exit(f"this is transformers {transformers.__version__}")
folder, tokens, out = sys.argv[1], torch.from_numpy(np.load(sys.argv[2])), sys.argv[3]
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
with torch.inference_mode():
    logits = {f"logits{n}": model(tokens[:, :n]).logits.numpy() for n in (1, 7, 1024)}
    greedy = model.generate(tokens[:, :6], max_new_tokens=64, do_sample=False, eos_token_id=[]).numpy()
    static = model.generate(
        tokens[:, :6], max_new_tokens=64, do_sample=False, eos_token_id=[],
        cache_implementation="static", disable_compile=True,
    ).numpy()
np.savez(out, greedy=greedy, static=static, **logits)
"""

FIELD_PROGRAM = """
import sys, numpy as np, torch, transformers
from transformers import AutoModelForCausalLM
if transformers.__version__ != sys.argv[3]:
    sys.exit(f"this is transformers {transformers.__version__}")
tokens, found = torch.from_numpy(np.load(sys.argv[1])), {}
for folder in sys.argv[4:]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        found[f"{len(found)}-{type(model).__name__}"] = model(tokens).logits.numpy()
np.savez(sys.argv[2], **found)
"""


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment with the older release; PyTorch comes from ours."""
    folder = tmp_path_factory.mktemp("transformers4")
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    python = folder / "bin" / "python"
    pip = subprocess.run(
        [python, "-m", "pip", "install", "-q", "--no-deps", *PINS], capture_output=True, text=True
    )
    if pip.returncode:
        unreachable = ("NewConnectionError", "ReadTimeoutError", "No matching distribution", "ProxyError")
        reason = pip.stderr.strip().splitlines()[-1]
        assert any(word in pip.stderr for word in unreachable), pip.stderr
        pytest.skip(f"the package registry gives no transformers {RELEASE}: {reason}")
    # Its own packages come first on the path, then ours.
    own = next((folder / "lib").glob("python*/site-packages"))
    (own / "ours.pth").write_text("\n".join(site.getsitepackages()))
    return python


def test_the_code_of_the_folder(python: Path, tmp_path: Path):
    """Everything that test_modeling_mtlm.py asks of it."""
    module = TESTS / "test_modeling_mtlm.py"
    run_there(
        python,
        tmp_path,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        f"--rootdir={TESTS.parents[1]}",
        module,
    )


def run_there(python: Path, tmp_path: Path, *arguments: str | Path) -> None:
    paths = {"PYTHONPATH": str(TESTS.parents[1])}
    environ = os.environ | paths | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [python, *map(str, arguments)], env=environ, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_logits_and_greedy_text(python: Path, tmp_path: Path, trained_1024: Path, exported_1024: Path):
    config, params = open_run(trained_1024)
    tokens = np.asarray(random_tokens(config, 2, 1024), np.int64)
    np.save(tmp_path / "tokens.npy", tokens)
    (tmp_path / "program.py").write_text(MODEL_PROGRAM)
    run_there(
        python, tmp_path, "program.py", exported_1024, tmp_path / "tokens.npy", tmp_path / "out.npz", RELEASE
    )
    out = np.load(tmp_path / "out.npz")
    for length in (1, 7, 1024):
        expected = flax_logits(config, params, tokens[:, :length])
        assert np.abs(out[f"logits{length}"] - expected).max() <= 2e-5
    import torch

    ours = transformers_model(exported_1024).generate(
        torch.from_numpy(tokens[:, :6]), max_new_tokens=64, do_sample=False, eos_token_id=[]
    )
    assert out["greedy"].tolist() == out["static"].tolist() == ours.tolist()


@pytest.mark.parametrize("name", ["mistral", "bytes"])
def test_1000_texts_are_encoded_and_decoded_alike(python: Path, tmp_path: Path, name: str):
    folder = tmp_path / name
    folder.mkdir()
    write_tokenizer(folder, load_tokenizer(name), 96)
    run_there(python, tmp_path, TESTS / "texts.py", folder, tmp_path / "out.json")
    texts = fuzzed_texts()
    got = json.loads((tmp_path / "out.json").read_text())
    for text, (ids, decoded), expected in zip(texts, got, expected_of(name, texts), strict=True):
        assert (ids, decoded) == expected, repr(text)


def test_the_stock_classes_read_what_is_exported(python: Path, tmp_path: Path):
    """Heads, norms and scaled positions are those of the newer release, under the older one's names."""
    tokens, folders, expected = tokens_of(2, 100), [], []
    for name in MODELS:
        make(name, tmp_path / "theirs" / name)
        opened = open_model(tmp_path / "theirs" / name)
        tensors = {tensor: opened.folder.read(tensor) for tensor in opened.leaves}
        folders.append(write_folder(tmp_path / name, opened.config, tensors))
        expected.append(transformers_logits(folders[-1], tokens))
    np.save(tmp_path / "tokens.npy", tokens)
    (tmp_path / "program.py").write_text(FIELD_PROGRAM)
    run_there(python, tmp_path, "program.py", "tokens.npy", "out.npz", RELEASE, *folders)
    out = np.load(tmp_path / "out.npz")
    assert len(out.files) == len(expected)
    for key, logits in zip(out.files, expected, strict=True):
        assert close(out[key], logits), key
