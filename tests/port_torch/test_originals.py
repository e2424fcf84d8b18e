"""The original MTLM1 and MTLM2, imported: the same logits as their own forward pass gives, or a refusal."""

import pickle
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import torch

from core.errors import UserError
from port_torch.formats import mtlm1_torch, mtlm2_orbax
from port_torch.formats.imported import Imported
from tests.models import whole_logits
from tests.port_torch.originals import TinyGPT, mtlm1_logits, mtlm1_weights, mtlm2_state
from tests.train_tpu.processes import refusal_here

VOCAB, D, LAYERS, HEADS, D_MLP, CONTEXT = 61, 48, 3, 4, 80, 24
GPT = TinyGPT(VOCAB, CONTEXT, D, LAYERS, HEADS)


def ours(imported: Imported, tokens: np.ndarray) -> np.ndarray:
    return np.asarray(whole_logits(imported.config, imported.params, jnp.asarray(tokens)))


def random_ids(length: int) -> np.ndarray:
    return np.random.default_rng(length).integers(0, VOCAB, (2, length), np.int32)


def assert_close(actual: np.ndarray, expected: np.ndarray) -> None:
    """Equal up to the order of float32 sums.

    A logit is a sum of D products behind LAYERS layers of such sums; each layer adds an error of about
    sqrt(D) roundings of 6e-8 of the values, here 7 x 6e-8 x 3 layers, and norms and softmax a few more: about
    2e-6 of the largest logit. Ten times that is allowed; a wrong permutation is off by the logits' own size.
    """
    assert np.abs(expected).max() > 1  # so that nothing is compared with zeros
    np.testing.assert_allclose(actual, expected, rtol=0, atol=2e-5 * np.abs(expected).max())


# MTLM1


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    return mtlm1_weights(VOCAB, D, LAYERS, D_MLP)


def saved(folder: Path, content: object) -> Path:
    path = folder / "original.pt"
    torch.save(content, path)
    return path


LENGTHS = pytest.mark.parametrize(
    "length", [CONTEXT, *(pytest.param(length, marks=pytest.mark.slow) for length in (1, 7))]
)


@LENGTHS
def test_mtlm1_gives_the_logits_of_its_own_forward_pass(weights, tmp_path, length):
    imported = mtlm1_torch.read(saved(tmp_path, weights), n_heads=HEADS)
    config = imported.config
    assert (config.vocab_size, config.d_model, config.n_layers, config.d_mlp) == (VOCAB, D, LAYERS, D_MLP)
    assert config.tied and not config.biases and config.context == 1024
    assert "1024" in imported.assumed
    tokens = random_ids(length)
    # In float64: the reference has no error of its own.
    exact = mtlm1_logits({name: value.double() for name, value in weights.items()}, tokens, HEADS)
    assert_close(ours(imported, tokens), exact)


def test_mtlm1_in_a_training_checkpoint_of_a_compiled_model(weights, tmp_path):
    wrapped = {f"_orig_mod.{name}": value for name, value in weights.items()}
    content = {"model": wrapped, "optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}}, "step": 7}
    imported = mtlm1_torch.read(saved(tmp_path, content), HEADS, CONTEXT)
    assert imported.assumed is None and imported.config.context == CONTEXT
    plain = mtlm1_torch.read(saved(tmp_path, weights), HEADS, CONTEXT)
    jax.tree.map(np.testing.assert_array_equal, imported.params, plain.params)


def test_mtlm1_heads_are_64_wide_unless_told(tmp_path):
    imported = mtlm1_torch.read(saved(tmp_path, mtlm1_weights(VOCAB, 128, 1, 64)))
    assert imported.config.n_heads == 2 and "2 heads of 64" in imported.assumed
    with pytest.raises(UserError, match="give --n-heads"):
        mtlm1_torch.read(saved(tmp_path, mtlm1_weights(VOCAB, D, 1, 64)))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda w: w.pop("layers.1.norm2.weight"), "lacks the tensor layers.1.norm2.weight"),
        (lambda w: w.update({"extra": torch.ones(2)}), "holds the tensor extra"),
        (
            lambda w: w.update({"layers.100000.norm1.weight": torch.ones(D)}),  # no table of as many layers
            r"lacks the tensor layers.3.norm1.weight \(7 more",
        ),
        (
            lambda w: w.update({"norm_f.weight": torch.ones(D + 1)}),
            r"norm_f.weight of shape \[49\] where \[48\]",
        ),
        (lambda w: w["layers.2.mlp.w3.weight"].fill_(torch.nan), "w3.weight in .* has NaN"),
        (lambda w: w.update({"lm_head.weight": torch.ones(VOCAB, D)}), "differ, and the original MTLM1 ties"),
        (lambda w: w.update({"norm_f.weight": torch.ones(D, dtype=torch.int32)}), "only float32"),
        (lambda w: w.pop("tok_emb.weight"), "is not an original MTLM1: it has no tok_emb.weight"),
    ],
)
def test_mtlm1_refusals(tmp_path, change, sentence):
    weights = mtlm1_weights(VOCAB, D, LAYERS, D_MLP)
    change(weights)
    with pytest.raises(UserError, match=sentence):
        mtlm1_torch.read(saved(tmp_path, weights), n_heads=HEADS)


class Malicious:
    """Pickled, it makes a file where it is opened."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("given", [{"n_heads": 0}, {"n_heads": HEADS, "context": 0}])
def test_mtlm1_takes_no_0_for_not_given(weights, tmp_path, given):
    with pytest.raises(UserError, match=r"is 0; it must"):
        mtlm1_torch.read(saved(tmp_path, weights), **given)


def test_mtlm1_runs_no_code_of_the_file(weights, tmp_path):
    trace = tmp_path / "was-run"
    path = saved(tmp_path, {"model": weights, "config": Malicious(trace)})
    for write in (lambda: None, lambda: path.write_bytes(pickle.dumps(Malicious(trace)))):
        write()
        with pytest.raises(UserError, match="can run arbitrary code") as refused:
            mtlm1_torch.read(path, n_heads=HEADS)
        assert "weights_only" not in str(refused.value)  # PyTorch's advice is to run it all the same
    assert not trace.exists()


def test_mtlm1_changed_bytes_are_noticed(weights, tmp_path):
    path = saved(tmp_path, weights)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match="does not match its checksum"):
        mtlm1_torch.read(path, n_heads=HEADS)
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match="not a whole file"):
        mtlm1_torch.read(path, n_heads=HEADS)


@pytest.mark.parametrize(
    "content",
    [
        b"version https://git-lfs.github.com/spec/v1\noid sha256:aa\nsize 123\n",
        b"<!DOCTYPE html><html>",
        b"",
        b"\x80\x02.",  # a pickle of nothing: its end finds an empty stack
        bytes(range(255, 0, -1)),
    ],
)
def test_mtlm1_what_is_no_file_of_pytorch_is_called_that(tmp_path, content):
    """Not one that would run code: that sends its owner to look for what is not there."""
    (tmp_path / "original.pt").write_bytes(content)
    with pytest.raises(UserError, match=r"original\.pt is not a whole file of PyTorch's \(.*\): copy it"):
        mtlm1_torch.read(tmp_path / "original.pt")


# MTLM2


@pytest.fixture(scope="module")
def state():
    return mtlm2_state(GPT)


@pytest.fixture(scope="module")
def checkpoint(state, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("orbax") / "state"
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, state)
    return path


@LENGTHS
def test_mtlm2_gives_the_logits_of_its_own_forward_pass(state, checkpoint, length):
    imported = mtlm2_orbax.read(checkpoint)
    config = imported.config
    assert (config.vocab_size, config.d_model, config.n_layers, config.n_heads) == (VOCAB, D, LAYERS, HEADS)
    assert (config.d_mlp, config.context) == (D * 4 * 2 // 3, CONTEXT)
    tokens = random_ids(length)
    assert_close(
        ours(imported, tokens), np.asarray(jax.jit(state.apply_fn)({"params": state.params}, tokens))
    )


@pytest.mark.slow
def test_mtlm2_from_a_manager_takes_the_newest_step(state, checkpoint, tmp_path):
    newer = state.replace(params=jax.tree.map(lambda x: 2 * x, state.params))
    with ocp.CheckpointManager(tmp_path / "run") as manager:
        for step, content in ((9, state), (10, newer)):
            manager.save(step, args=ocp.args.StandardSave(content))
    assert mtlm2_orbax.recognizes(tmp_path / "run")
    imported, plain = mtlm2_orbax.read(tmp_path / "run"), mtlm2_orbax.read(checkpoint)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, 2 * b), imported.params, plain.params)


def save_changed(state, change, folder: Path) -> Path:
    params = jax.tree.map(lambda x: x, state.params)
    change(params)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / "changed", {"params": params, "step": 1})
    return folder / "changed"


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda p: p["block_1"].pop("RMSNorm_1"), "lacks the tensor block_1/RMSNorm_1/scale"),
        (lambda p: p.update({"extra": jnp.ones(2)}), "holds the tensor extra"),
        (
            lambda p: p.update({"block_100000": {"RMSNorm_0": {"scale": jnp.ones(D)}}}),
            r"lacks the tensor block_3/RMSNorm_0/scale \(14 more",
        ),
        (
            lambda p: p["norm_f"].update({"scale": jnp.ones(D - 1)}),
            r"norm_f/scale of shape \[47\] where \[48\]",
        ),
        (
            lambda p: p["head"].update({"kernel": jnp.full((D, VOCAB), jnp.inf)}),
            "head/kernel in .* has NaN",
        ),
        (lambda p: p["head"].update({"kernel": jnp.zeros((D, VOCAB))}), "all zeros, as if its file"),
        (lambda p: p.pop("pos_emb"), "pos_emb is missing"),
        (
            lambda p: p.update({"pos_emb": jnp.ones((2, CONTEXT, D))}),  # of which the second would be lost
            "pos_emb is missing or has not 2 axes",
        ),
        (
            lambda p: p["head"].update({"kernel": jnp.ones((D, VOCAB), jnp.int8)}),
            "head/kernel in .* is of type int8: only float32, bfloat16, float16",
        ),
    ],
)
def test_mtlm2_refusals(state, tmp_path, change, sentence):
    with pytest.raises(UserError, match=sentence):
        mtlm2_orbax.read(save_changed(state, change, tmp_path))


@pytest.mark.slow
def test_mtlm2_in_a_narrower_type_is_read_exactly(state, tmp_path):
    def narrow(params: dict) -> None:
        params["head"]["kernel"] = params["head"]["kernel"].astype(jnp.bfloat16)

    imported = mtlm2_orbax.read(save_changed(state, narrow, tmp_path))
    expected = state.params["head"]["kernel"].astype(jnp.bfloat16).astype(jnp.float32)
    np.testing.assert_array_equal(imported.params["head"]["kernel"], expected)


def test_mtlm2_a_file_that_is_gone(checkpoint, tmp_path):
    copy = shutil.copytree(checkpoint, tmp_path / "copy")
    shutil.rmtree(copy / "ocdbt.process_0")
    shutil.rmtree(copy / "d")
    # Once: what Orbax leaves behind of a failed read would speak up during a second one.
    sentence = refusal_here(copy, tmp_path / "out", module="port_torch.import_checkpoint")
    assert "copy it again" in sentence and not (tmp_path / "out").exists()
