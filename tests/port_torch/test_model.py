"""The mirror against Flax and transformers: logits, gradients, greedy text, a cache, compilation."""

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from core.config import ModelConfig
from core.documents import document_mark, number_documents
from core.generation import Generator
from core.model import Compute, Params, forward, logits
from core.sampling import Sampling
from port_torch.model import Decoder, load, parameter_name
from port_torch.names import exported_tensors
from tests.core.test_model import FLOAT32, errors
from tests.models import BOTH, GPT, GROUPED, LLAMA, flat, random_params, random_tokens
from tests.packed import BOTH_MARKS, alone64, windows
from tests.port_torch.folders import tensors_of
from tests.port_torch.trained import open_run, transformers_logits, transformers_model

# Every mixture of parts that the config allows to differ from the two models.
MIXED = {
    **BOTH,
    "biased llama": dataclasses.replace(LLAMA, biases=True, tied=False),
    "rope gelu": dataclasses.replace(GPT, positions="rope", biases=False),
    "tied gpt": dataclasses.replace(GPT, tied=True),
    "relu2": dataclasses.replace(LLAMA, mlp="relu2"),
    "grouped": GROUPED,
    "one kv head": dataclasses.replace(GPT, n_kv_heads=1),
    "yarn": dataclasses.replace(LLAMA, rope_scaling="yarn,factor=4,original_context=16"),
}


def mirror(config: ModelConfig, params: Params) -> Decoder:
    """The mirror with these parameters, without a folder in between."""
    tensors = tensors_of(config, params)
    model = Decoder(config)
    leaves = exported_tensors(config)
    model.load_state_dict({parameter_name(leaf): tensors[name] for name, leaf in leaves.items()})
    return model.eval()


def flax_logits(config: ModelConfig, params: Params, tokens) -> np.ndarray:
    run = jax.jit(lambda p, t: logits(config, p, forward(config, p, t)))
    return np.asarray(run(params, jnp.asarray(tokens, jnp.int32)))


def mirror_logits(model: Decoder, tokens) -> np.ndarray:
    with torch.inference_mode():
        return model.logits(model(torch.tensor(np.asarray(tokens), dtype=torch.long))).numpy()


def test_trained_logits_are_equal(trained: Path, exported: Path):
    config, params = open_run(trained)
    mirror, hf = load(exported), transformers_model(exported)
    for length in (1, 96):
        tokens = random_tokens(config, 3, length)
        expected = flax_logits(config, params, tokens)
        assert np.abs(expected).max() > 3  # a trained model: its logits are not all alike
        # The figure; measured up to 4e-6 here.
        assert np.abs(mirror_logits(mirror, tokens) - expected).max() <= 2e-5
        with torch.inference_mode():
            theirs = hf(torch.tensor(np.asarray(tokens), dtype=torch.long)).logits.numpy()
        assert np.abs(theirs - expected).max() <= 2e-5


@pytest.mark.slow
def test_trained_logits_are_equal_over_1024_positions(trained_1024: Path, exported_1024: Path):
    config, params = open_run(trained_1024)
    for length in (1, 7, 1024):
        tokens = random_tokens(config, 2, length)
        expected = flax_logits(config, params, tokens)
        assert np.abs(mirror_logits(load(exported_1024), tokens) - expected).max() <= 2e-5
        assert np.abs(transformers_logits(exported_1024, np.asarray(tokens)) - expected).max() <= 2e-5


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[pytest.mark.slow] * (kind not in ("gpt", "relu2"))) for kind in MIXED]
)
def test_logits_and_gradients_are_equal_where_every_leaf_matters(kind: str):
    config = MIXED[kind]
    params = random_params(config)
    tokens = random_tokens(config, 2, 33)
    model = mirror(config, params)

    def loss(params: Params) -> tuple[jax.Array, jax.Array]:
        scores = logits(config, params, forward(config, params, tokens))
        nll = -jnp.take_along_axis(jax.nn.log_softmax(scores), jnp.roll(tokens, -1, 1)[..., None], -1)
        return nll.mean(), scores

    (_, expected), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    ids = torch.tensor(np.asarray(tokens), dtype=torch.long)
    scores = model.logits(model(ids))
    torch.nn.functional.cross_entropy(scores.flatten(0, 1), ids.roll(-1, 1).flatten()).backward()

    # Sums of float32 in another order: parts in 1e5 of the largest value. Without rotation the gradient of a
    # key's bias is nothing but rounding, since the softmax does not see what all its scores share.
    def close(ours, theirs, what: str) -> None:
        assert np.abs(ours - theirs).max() <= 1e-7 + 1e-5 * np.abs(theirs).max(), what

    close(scores.detach().numpy(), np.asarray(expected), "logits")
    leaves, ours = flat(gradients), dict(model.named_parameters())
    for name, leaf in exported_tensors(config).items():
        theirs = leaves[leaf.path] if leaf.layer is None else leaves[leaf.path][leaf.layer]
        gradient = ours[parameter_name(leaf)].grad.numpy()
        close(gradient.T if leaf.transposed else gradient, theirs, name)


@pytest.mark.parametrize("config", [GPT, GROUPED], ids=["gpt", "grouped"])
def test_a_packed_window_is_its_documents_alone(config: ModelConfig):
    params, (tokens, owners) = random_params(config), windows(BOTH_MARKS, 48)
    tokens, owners = tokens[:2], owners[:2]
    true_scores, true_loss, true_gradients = alone64(config, params, tokens, owners)
    model, ids, targets = mirror(config, params), tokens[:, :-1].astype(int), tokens[:, 1:].astype(int)
    documents = torch.tensor(number_documents(ids, document_mark(BOTH_MARKS)))
    scores = model.logits(model(torch.tensor(ids), documents=documents))
    loss = torch.nn.functional.cross_entropy(scores.flatten(0, 1), torch.tensor(targets).flatten())
    loss.backward()
    assert abs(loss.item() - true_loss) <= FLOAT32 * true_loss
    ours, gradients = dict(model.named_parameters()), jax.tree.map(np.zeros_like, true_gradients)
    for leaf in exported_tensors(config).values():
        gradient = ours[parameter_name(leaf)].grad.numpy()
        place = ... if leaf.layer is None else leaf.layer
        gradients[leaf.path][place] = gradient.T if leaf.transposed else gradient
    found = errors(scores.detach().numpy(), gradients, true_scores, true_gradients)
    assert max(found.values()) < FLOAT32, found


def test_the_parameters_are_those_of_flax():
    for config in MIXED.values():
        names = {parameter_name(leaf) for leaf in exported_tensors(config).values()}
        model = Decoder(config)
        assert names == {name for name, _ in model.named_parameters()}
        assert sum(p.numel() for p in model.parameters()) == config.n_params


def greedy(model: Decoder, step, prompts: list[list[int]], n: int) -> list[list[int]]:
    """Continuations with a cache: the prompts in one pass, padded on the right, then token by token."""
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    width = int(lengths.max())
    tokens = torch.tensor([prompt + [0] * (width - len(prompt)) for prompt in prompts])
    cache = model.empty_cache(len(prompts), model.config.context)
    positions = torch.arange(width).expand(len(prompts), -1)
    made = []
    with torch.inference_mode():
        hidden = step(tokens, positions, cache)
        hidden = hidden[torch.arange(len(prompts)), lengths - 1]
        for i in range(n):
            token = model.logits(hidden).argmax(-1)
            made.append(token)
            if i < n - 1:
                hidden = step(token[:, None], (lengths + i)[:, None], cache)[:, 0]
    return torch.stack(made, 1).tolist()


def test_64_greedy_tokens_are_equal(trained: Path, exported: Path):
    config, params = open_run(trained)
    model = load(exported)
    n = 64
    prompts = [[256, *b"Docu"], [256, *b"t"], [256, *b"he"]]
    flax = Generator(config, Compute()).complete(params, prompts, Sampling(temperature=0), n)
    assert greedy(model, model, prompts, n) == flax
    hf = transformers_model(exported)
    for prompt, expected in zip(prompts, flax, strict=True):
        made = hf.generate(torch.tensor([prompt]), max_new_tokens=n, do_sample=False, eos_token_id=[])
        assert made[0, len(prompt) :].tolist() == expected


def test_transformers_pads_on_the_left_and_caches_at_a_fixed_size(exported: Path):
    hf = transformers_model(exported)
    prompts = [[256, *b"Document 1"], [256, *b"th"]]
    alone = [
        hf.generate(torch.tensor([p]), max_new_tokens=20, do_sample=False, eos_token_id=[])[0, len(p) :]
        for p in prompts
    ]
    width = max(map(len, prompts))
    tokens = torch.tensor([[257] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    options = {"attention_mask": mask, "max_new_tokens": 20, "do_sample": False, "eos_token_id": []}
    for kind in ("dynamic", "static"):
        made = hf.generate(tokens, cache_implementation=kind, disable_compile=True, **options)
        assert made[:, width:].tolist() == [row.tolist() for row in alone], kind


@pytest.mark.parametrize("kind", BOTH)
def test_a_cache_does_not_change_the_logits(kind: str):
    config = BOTH[kind]
    model = mirror(config, random_params(config))
    tokens = torch.tensor(np.asarray(random_tokens(config, 2, 20)), dtype=torch.long)
    with torch.inference_mode():
        whole = model(tokens)
        cache = model.empty_cache(2, config.context)
        positions = torch.arange(20).expand(2, -1)
        parts = [model(tokens[:, a:b], positions[:, a:b], cache) for a, b in ((0, 11), (11, 12), (12, 20))]
    assert torch.allclose(torch.cat(parts, 1), whole, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", BOTH)
def test_compiled_without_a_graph_break(kind: str):
    config = BOTH[kind]
    model = mirror(config, random_params(config))
    torch.compiler.reset()  # what other tests of this process compiled counts to its limit of recompilations
    compiled = functools.partial(torch.compile, fullgraph=True, backend="aot_eager")(model)
    tokens = torch.tensor(np.asarray(random_tokens(config, 2, 16)), dtype=torch.long)
    with torch.no_grad():
        assert torch.allclose(compiled(tokens), model(tokens), rtol=1e-5, atol=1e-5)
        prompts = [[1, 2, 3], [4, 5]]
        assert greedy(model, compiled, prompts, 8) == greedy(model, model, prompts, 8)
    compiled(tokens).sum().backward()


@pytest.mark.slow
@pytest.mark.parametrize("kind", BOTH)
def test_compiled_by_inductor(kind: str):
    config = BOTH[kind]
    model = mirror(config, random_params(config))
    torch.compiler.reset()  # what other tests of this process compiled counts to its limit of recompilations
    compiled = torch.compile(model, fullgraph=True)
    tokens = torch.tensor(np.asarray(random_tokens(config, 2, 16)), dtype=torch.long)
    with torch.no_grad():
        assert torch.allclose(compiled(tokens), model(tokens), rtol=1e-4, atol=1e-4)


def test_dropout_is_of_training_alone():
    config = dataclasses.replace(GPT, dropout=0.5)
    model = mirror(config, random_params(config))
    tokens = torch.tensor(np.asarray(random_tokens(config, 2, 8)), dtype=torch.long)
    assert torch.equal(model(tokens), model(tokens))
    model.train()
    assert not torch.equal(model(tokens), model(tokens))
