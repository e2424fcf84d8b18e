"""A model's sizes as `transformers` writes them in config.json, in both directions.

Rotary positions with SwiGLU are a stock Llama. Every other mixture of the decoder's parts is `model_type`
"mtlm", which has Llama's field names and two more, and whose code lies in the folder (port_torch/hf).
"""

from typing import Any

from core.config import ModelConfig
from core.errors import UserError

# How transformers names the two MLPs by their activations. GELU is the tanh form.
ACTIVATIONS = {"swiglu": "silu", "gelu": "gelu_pytorch_tanh"}
MLPS = {activation: mlp for mlp, activation in ACTIVATIONS.items()}

Json = dict[str, Any]


def is_llama(config: ModelConfig) -> bool:
    """Whether transformers' own Llama computes this model; biases it knows, too."""
    return config.positions == "rope" and config.mlp == "swiglu"


def hf_config(config: ModelConfig, bos: int, eos: int, dtype: str) -> Json:
    """The content of config.json. bos, eos: token ids; dtype: of the weights in the folder."""
    c = config
    if is_llama(c):
        kind: Json = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    else:
        kind = {
            "architectures": ["MtlmForCausalLM"],
            "model_type": "mtlm",
            "auto_map": {
                "AutoConfig": "configuration_mtlm.MtlmConfig",
                "AutoModel": "modeling_mtlm.MtlmModel",
                "AutoModelForCausalLM": "modeling_mtlm.MtlmForCausalLM",
            },
            "positions": c.positions,
        }
    return kind | {
        "vocab_size": c.vocab_size,
        "max_position_embeddings": c.context,
        "hidden_size": c.d_model,
        "intermediate_size": c.d_mlp,
        "num_hidden_layers": c.n_layers,
        "num_attention_heads": c.n_heads,
        "num_key_value_heads": c.n_heads,
        "head_dim": c.head_dim,
        "hidden_act": ACTIVATIONS[c.mlp],
        "attention_bias": c.biases,
        "mlp_bias": c.biases,
        "attention_dropout": 0.0,
        "rms_norm_eps": c.norm_eps,
        "initializer_range": c.init_std,
        "tie_word_embeddings": c.tied,
        # Both spellings of both: transformers 4.57 reads rope_theta and torch_dtype, and silently takes its
        # own default where it finds only the new ones.
        "rope_theta": c.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": c.rope_theta},
        "torch_dtype": dtype,
        "dtype": dtype,
        "bos_token_id": bos,
        "eos_token_id": eos,
        "use_cache": True,
    }


def model_config(content: Json) -> ModelConfig:
    """The model that a config.json describes, what only training needs (dropout, init) left at its default.

    Raises:
        UserError: it lacks a size, or asks for what this decoder does not have.
    """
    kind = content.get("model_type")
    if kind not in ("llama", "mtlm"):
        raise UserError(f"config.json is of a {kind!r} model: only 'llama' and our own 'mtlm' are read")

    def need(name: str) -> Any:
        if content.get(name) is None:
            raise UserError(f"config.json has no {name}: copy the folder again from where it came")
        return content[name]

    def refuse(what: str) -> None:
        raise UserError(f"config.json asks for {what}, which the decoder here does not have")

    heads, width = need("num_attention_heads"), need("hidden_size")
    activation = content.get("hidden_act", "silu")
    rope = content.get("rope_parameters") or content.get("rope_scaling") or {}
    biases = {bool(content.get(name, False)) for name in ("attention_bias", "mlp_bias")}
    if (content.get("num_key_value_heads") or heads) != heads:
        refuse(f"{content['num_key_value_heads']} key and value heads for {heads} heads (grouped heads)")
    if (content.get("head_dim") or width // heads) * heads != width:
        refuse(f"heads of {content['head_dim']} elements in a width of {width} with {heads} heads")
    if activation not in MLPS or (kind == "llama" and activation != "silu"):
        refuse(f"the activation {activation!r}")
    if rope.get("rope_type", rope.get("type", "default")) != "default":
        refuse(f"rotary positions scaled by {rope.get('rope_type', rope.get('type'))!r}")
    if len(biases) == 2:
        refuse("biases in one of attention and MLP but not in the other")
    return ModelConfig(
        vocab_size=need("vocab_size"),
        context=need("max_position_embeddings"),
        d_model=width,
        n_layers=need("num_hidden_layers"),
        n_heads=heads,
        d_mlp=need("intermediate_size"),
        positions=content.get("positions", "rope"),
        mlp=MLPS[activation],
        biases=biases.pop(),
        tied=content.get("tie_word_embeddings", False),
        rope_theta=float(rope.get("rope_theta") or content.get("rope_theta") or 10_000.0),
        norm_eps=content.get("rms_norm_eps", 1e-6),
        init_std=content.get("initializer_range", 0.02),
    )
