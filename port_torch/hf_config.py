"""A model's sizes as `transformers` writes them in config.json, in both directions.

Rotary positions with SwiGLU are a stock Llama. Every other mixture of the decoder's parts is `model_type`
"mtlm", which has Llama's field names and two more, and whose code lies in the folder (port_torch/hf).
"""

import functools
import reprlib
import sys
from collections.abc import Callable
from typing import Any, NoReturn

from core.config import ModelConfig
from core.errors import UserError
from core.leaves import HIDDEN_ACT

MLPS = {activation: mlp for mlp, activation in HIDDEN_ACT.items()}

Json = dict[str, Any]

# Every key of a Llama's config.json is one of four kinds. Those that say what it computes:
COMPUTED = frozenset({
    "model_type", "vocab_size", "max_position_embeddings", "hidden_size", "intermediate_size",
    "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "hidden_act",
    "rms_norm_eps", "attention_bias", "mlp_bias", "tie_word_embeddings", "rope_theta", "rope_parameters",
    "rope_scaling", "positions", "initializer_range",
})  # fmt: skip
# Those that would change what it computes, and the values with which they do not: any other is refused.
# Sliding windows act through the cache that transformers makes of the config.
FIXED: dict[str, tuple[Any, ...]] = {
    "quantization_config": (None,),
    "compression_config": (None,),
    "partial_rotary_factor": (None, 1.0),
    "rope_interleaved": (None, False),
    "sliding_window": (None,),
    "attention_chunk_size": (None,),
    "layer_types": (None,),
    "is_causal": (None, True),
    "is_encoder_decoder": (None, False),
    "add_cross_attention": (None, False),
    "cross_attention_hidden_size": (None,),
    "pruned_heads": (None, {}),
}
# Those that change no logit: names, special tokens, how to train, generate or run, and other tasks' labels.
IRRELEVANT = frozenset({
    "_name_or_path", "_attn_implementation", "_attn_implementation_autoset", "_commit_hash", "architectures",
    "attention_dropout", "bad_words_ids", "begin_suppress_tokens", "bos_token_id", "chunk_size_feed_forward",
    "decoder_start_token_id", "diversity_penalty", "do_sample", "dtype", "early_stopping",
    "encoder_no_repeat_ngram_size", "eos_token_id", "exponential_decay_length_penalty", "finetuning_task",
    "forced_bos_token_id", "forced_eos_token_id", "id2label", "is_decoder", "is_llama_config", "label2id",
    "length_penalty", "max_length", "min_length", "no_repeat_ngram_size", "num_beam_groups", "num_beams",
    "num_return_sequences", "output_attentions", "output_hidden_states", "output_scores", "pad_token_id",
    "prefix", "pretraining_tp", "problem_type", "remove_invalid_values", "repetition_penalty", "return_dict",
    "return_dict_in_generate", "sep_token_id", "suppress_tokens", "task_specific_params", "temperature",
    "tf_legacy_loss", "tie_encoder_decoder", "tokenizer_class", "top_k", "top_p", "torch_dtype",
    "torchscript", "transformers_version", "typical_p", "use_bfloat16", "use_cache",
})  # fmt: skip
# And those that nobody knows: transformers' Llama takes no notice of them; here they are named on stderr.

MAX_SIZE = 2**24
"""No size of a model is beyond it; a damaged file's might not fit anywhere."""
NULLABLE = {"num_key_value_heads", "head_dim"}
ROPE_KEYS = {"rope_type", "type", "rope_theta"}


def is_llama(config: ModelConfig) -> bool:
    """Whether transformers' own Llama computes this model; biases it knows, too."""
    return config.positions == "rope" and config.mlp == "swiglu"


def hf_config(config: ModelConfig, bos: int, eos: int, dtype: str) -> Json:
    """The content of config.json. bos, eos: token ids; dtype: of the weights in the folder."""
    c = config
    rope = {"rope_type": "default", "rope_theta": c.rope_theta}
    if is_llama(c):
        kind: Json = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    else:
        # transformers 5 checks rope_parameters against the head size even where nothing is rotated.
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
        "hidden_act": HIDDEN_ACT[c.mlp],
        "attention_bias": c.biases,
        "mlp_bias": c.biases,
        "attention_dropout": 0.0,
        "rms_norm_eps": c.norm_eps,
        "initializer_range": c.init_std,
        "tie_word_embeddings": c.tied,
        # Both spellings of both: transformers 4.57 reads rope_theta and torch_dtype, and silently takes its
        # own default where it finds only the new ones.
        "rope_theta": c.rope_theta,
        **({"rope_parameters": rope} if c.positions == "rope" else {}),
        "torch_dtype": dtype,
        "dtype": dtype,
        "bos_token_id": bos,
        "eos_token_id": eos,
        "use_cache": True,
    }


def model_config(content: Json) -> ModelConfig:
    """The model that a config.json describes, what only training needs (dropout) left at its default.

    Raises:
        UserError: it lacks a size, has a value of the wrong type, or asks for what this decoder lacks.
    """
    kind = content.get("model_type")
    if kind not in ("llama", "mtlm"):
        raise UserError(
            f"config.json is of a {reprlib.repr(kind)} model: only 'llama' and our own 'mtlm' are read"
        )
    ours = kind == "mtlm"
    for name, allowed in FIXED.items():
        if not _is_one_of(content.get(name), allowed):
            _refuse(f"{name} {reprlib.repr(content[name])}")
    if not ours and content.get("auto_map"):
        _refuse("code of its own (auto_map)")
    _name_unknown(frozenset(content.keys() - COMPUTED - FIXED.keys() - IRRELEVANT - {"auto_map"}))

    def size(name: str, default: int | None = None) -> int:
        return _read(content, name, default, _is_size, f"a whole number from 1 to {MAX_SIZE:,}")

    def number(name: str, default: float) -> float:
        # Ours has every key; transformers' defaults, which are those here, are a Llama's.
        known = None if ours else default
        return float(_read(content, name, known, _is_positive, "a positive number"))

    def flag(name: str, default: bool) -> bool:
        return _read(
            content, name, None if ours else default, lambda value: isinstance(value, bool), "true or false"
        )

    def word(name: str, default: str | None) -> str:
        return _read(content, name, default, lambda value: isinstance(value, str), "a word")

    heads, width = size("num_attention_heads"), size("hidden_size")
    activation = word("hidden_act", None if ours else "silu")
    positions = word("positions", None) if ours else "rope"
    kv_heads, head_dim = size("num_key_value_heads", heads), size("head_dim", max(1, width // heads))
    biases = {flag("attention_bias", False), flag("mlp_bias", False)}
    if kv_heads != heads:
        _refuse(f"{kv_heads} key and value heads for {heads} heads (grouped heads)")
    if head_dim * heads != width:
        _refuse(f"heads of {head_dim} elements in a width of {width} with {heads} heads")
    if activation not in MLPS or (not ours and activation != "silu"):
        _refuse(f"the activation {reprlib.repr(activation)}")
    if positions not in ("rope", "learned"):
        _refuse(f"{reprlib.repr(positions)} positions")
    if len(biases) == 2:
        _refuse("biases in one of attention and MLP but not in the other")
    return ModelConfig(
        vocab_size=size("vocab_size"),
        context=size("max_position_embeddings"),
        d_model=width,
        n_layers=size("num_hidden_layers"),
        n_heads=heads,
        d_mlp=size("intermediate_size"),
        positions=positions,
        mlp=MLPS[activation],
        biases=biases.pop(),
        tied=flag("tie_word_embeddings", False),
        rope_theta=_rope_theta(content),
        norm_eps=number("rms_norm_eps", 1e-6),
        init_std=number("initializer_range", 0.02),
    )


def _rope_theta(content: Json) -> float:
    """Theta of rotary positions that are not scaled.

    transformers writes it into rope_parameters from release 5 on, next to them before, and prefers an old
    rope_scaling to either: all that are there must say the same.
    """
    thetas = []
    for name in ("rope_parameters", "rope_scaling"):
        rope = content.get(name)
        if rope is None:
            continue
        if not isinstance(rope, dict):
            _wrong(name, rope, "an object")
        scaling = rope.get("rope_type", rope.get("type", "default"))
        if scaling != "default":
            _refuse(f"rotary positions scaled by {reprlib.repr(scaling)} ({name})")
        surplus = sorted(rope.keys() - ROPE_KEYS)
        if surplus:
            _refuse(f"{surplus[0]} {reprlib.repr(rope[surplus[0]])} of rotary positions ({name})")
        thetas.append((f"{name}.rope_theta", rope.get("rope_theta")))
    thetas.append(("rope_theta", content.get("rope_theta")))
    given = {name: theta for name, theta in thetas if theta is not None}
    for name, theta in given.items():
        if not _is_positive(theta):
            _wrong(name, theta, "a positive number")
    if len(set(given.values())) > 1:
        said = " and ".join(f"{name} {theta}" for name, theta in given.items())
        raise UserError(f"config.json says {said}: leave the one that the model was trained with")
    return float(next(iter(given.values()), 10_000.0))


def _read(content: Json, name: str, default: Any, fits: Callable[[Any], bool], what: str) -> Any:
    """The value of a key, of the type that `fits` asks for, or the default where the key is missing.

    Raises:
        UserError: it is of another type, or missing where there is no default.
    """
    value = content.get(name, default)
    if value is None and name in NULLABLE:
        value = default
    if value is None:
        raise UserError(f"config.json has no {name}: copy the folder again from its source")
    if not fits(value):
        _wrong(name, value, what)
    return value


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= MAX_SIZE


def _is_positive(value: Any) -> bool:
    """Positive, finite, and still so as a float32."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 1e-37 <= value <= 1e37


def _is_one_of(value: Any, allowed: tuple[Any, ...]) -> bool:
    """Not by == alone, for which 0 is False."""
    return any(value == other and isinstance(value, bool) == isinstance(other, bool) for other in allowed)


def _wrong(name: str, value: Any, what: str) -> NoReturn:
    raise UserError(
        f"config.json says {name} {reprlib.repr(value)}, which is not {what}: "
        "copy the folder again from its source"
    )


def _refuse(what: str) -> NoReturn:
    raise UserError(f"config.json asks for {what}, which the decoder here does not have")


@functools.cache  # one folder is opened several times
def _name_unknown(names: frozenset[str]) -> None:
    if names:
        listed = ", ".join(map(reprlib.repr, sorted(names)))
        print(f"note: config.json has unknown keys, which are ignored: {listed}", file=sys.stderr)
