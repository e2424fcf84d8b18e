"""The original models of the MTLM series, written anew from their description, to compare imports with.

MTLM1 is a PyTorch model with interleaved rotary positions and one product for query, key and value; MTLM2
(TinyGPT) is a flax.linen model. Neither shares code with ours.
"""

import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax.training.train_state import TrainState

# --- MTLM1, torch ---


def mtlm1_weights(
    vocab: int, d: int, n_layers: int, d_mlp: int, seed: int = 0, std: float = 0.2
) -> dict[str, torch.Tensor]:
    """A state dict with the original's names, float32; the head is the embedding table."""
    draw = torch.Generator().manual_seed(seed)

    def matrix(*shape: int) -> torch.Tensor:
        return std * torch.randn(*shape, generator=draw)

    def scale() -> torch.Tensor:
        return 1 + 0.3 * torch.randn(d, generator=draw)

    weights = {"tok_emb.weight": matrix(vocab, d)}
    for i in range(n_layers):
        weights |= {
            f"layers.{i}.norm1.weight": scale(),
            f"layers.{i}.attn.qkv.weight": matrix(3 * d, d),
            f"layers.{i}.attn.o_proj.weight": matrix(d, d),
            f"layers.{i}.norm2.weight": scale(),
            f"layers.{i}.mlp.w1.weight": matrix(d_mlp, d),
            f"layers.{i}.mlp.w2.weight": matrix(d_mlp, d),
            f"layers.{i}.mlp.w3.weight": matrix(d, d_mlp),
        }
    weights["norm_f.weight"] = scale()
    weights["lm_head.weight"] = weights["tok_emb.weight"]
    return weights


def mtlm1_logits(weights: dict[str, torch.Tensor], tokens: np.ndarray, n_heads: int) -> np.ndarray:
    """The original forward pass, in the type of the weights; tokens [B, S] -> [B, S, V].

    Rotary positions turn neighbouring elements (2i, 2i + 1) of a head, as complex numbers.
    """
    n_layers = sum(name.endswith("attn.qkv.weight") for name in weights)
    x = weights["tok_emb.weight"][torch.from_numpy(np.array(tokens)).long()]
    b, s, d = x.shape
    head = d // n_heads
    frequency = 1.0 / 10_000.0 ** (torch.arange(0, head, 2, dtype=torch.float64) / head)
    angle = torch.outer(torch.arange(s, dtype=torch.float64), frequency)
    turn = torch.polar(torch.ones_like(angle), angle)[:, None]  # [S, 1, K/2]

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-6) * weights[name]

    def rotated(x: torch.Tensor) -> torch.Tensor:
        pairs = torch.view_as_complex(x.double().reshape(b, s, n_heads, head // 2, 2).contiguous())
        return torch.view_as_real(pairs * turn).reshape(b, s, n_heads, head).to(x.dtype)

    future = torch.triu(torch.ones(s, s, dtype=torch.bool), 1)
    for i in range(n_layers):
        qkv = norm(x, f"layers.{i}.norm1.weight") @ weights[f"layers.{i}.attn.qkv.weight"].T
        q, k, v = (part.reshape(b, s, n_heads, head) for part in qkv.split(d, dim=-1))
        scores = torch.einsum("bqhk,bshk->bhqs", rotated(q), rotated(k)) / head**0.5
        weight = scores.masked_fill(future, -torch.inf).softmax(-1)
        y = torch.einsum("bhqs,bshk->bqhk", weight, v).reshape(b, s, d)
        x = x + y @ weights[f"layers.{i}.attn.o_proj.weight"].T
        h = norm(x, f"layers.{i}.norm2.weight")
        gate, up = (h @ weights[f"layers.{i}.mlp.{name}.weight"].T for name in ("w1", "w2"))
        x = x + (gate * torch.sigmoid(gate) * up) @ weights[f"layers.{i}.mlp.w3.weight"].T
    return (norm(x, "norm_f.weight") @ weights["lm_head.weight"].T).numpy()


# --- MTLM2, flax.linen ---


class Block(linen.Module):
    n_heads: int
    d_mlp: int

    @linen.compact
    def __call__(self, x):
        h = linen.RMSNorm(epsilon=1e-6)(x)
        mask = linen.make_causal_mask(jnp.ones(x.shape[:2]))
        x = x + linen.MultiHeadDotProductAttention(num_heads=self.n_heads)(h, h, mask=mask)
        h = linen.Dense(self.d_mlp)(linen.RMSNorm(epsilon=1e-6)(x))
        return x + linen.Dense(x.shape[-1])(linen.gelu(h, approximate=True))


class TinyGPT(linen.Module):
    vocab: int
    context: int
    d: int
    n_layers: int
    n_heads: int

    @linen.compact
    def __call__(self, tokens):
        positions = self.param("pos_emb", linen.initializers.normal(0.02), (self.context, self.d))
        x = linen.Embed(self.vocab, self.d, name="tok_emb")(tokens) + positions[: tokens.shape[1]]
        for i in range(self.n_layers):
            x = Block(self.n_heads, int(self.d * 4 * 2 / 3), name=f"block_{i}")(x)
        x = linen.RMSNorm(epsilon=1e-6, name="norm_f")(x)
        return linen.Dense(self.vocab, use_bias=False, name="head")(x)


def mtlm2_state(model: TinyGPT, seed: int = 0, std: float = 0.2) -> TrainState:
    """A training state as the original has it; no norm is 1 and no bias 0."""
    import optax

    params = jax.eval_shape(model.init, jax.random.key(seed), jnp.zeros((1, 2), jnp.int32))["params"]
    rng = np.random.default_rng(seed)

    def leaf(path: tuple, shape: jax.ShapeDtypeStruct) -> jax.Array:
        noise = rng.standard_normal(shape.shape)
        return jnp.asarray(1 + 0.3 * noise if path[-1].key == "scale" else std * noise, jnp.float32)

    params = jax.tree.map_with_path(leaf, params)
    return TrainState.create(apply_fn=model.apply, params=params, tx=optax.adamw(1e-3))
