"""A model's sizes as `transformers` writes them in config.json, in both directions.

Rotary positions with SwiGLU are a stock class of transformers: a Llama, with biases of queries, keys and
values a Qwen2, with norms of queries and keys a Qwen3. Every other mixture of the decoder's parts is
`model_type` "mtlm", which has Llama's field names and some more, and whose code lies in the folder
(port_torch/hf).
"""

import functools
import math
import reprlib
import sys
from collections.abc import Callable
from typing import Any, NoReturn

from core.config import ModelConfig
from core.errors import UserError
from core.leaves import HIDDEN_ACT
from core.rope import KINDS, Scaling, make_scaling

MLPS = {activation: mlp for mlp, activation in HIDDEN_ACT.items()}

Json = dict[str, Any]

STOCK = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
"""Class of transformers for every `model_type` that is read and written."""

# Every key of their config.json is one of four kinds. Those that say what it computes:
COMPUTED = frozenset({
    "model_type", "vocab_size", "max_position_embeddings", "hidden_size", "intermediate_size",
    "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "hidden_act",
    "rms_norm_eps", "attention_bias", "mlp_bias", "tie_word_embeddings", "rope_theta", "rope_parameters",
    "rope_scaling", "original_max_position_embeddings", "initializer_range", "use_sliding_window",
    "sliding_window",
    "layer_types", "positions", "qkv_bias", "qk_norm", "scaled_rope",
})  # fmt: skip
# Those that would change what it computes, and the values with which they do not: any other is refused.
# Sliding windows act through the cache that transformers makes of the config.
FIXED: dict[str, tuple[Any, ...]] = {
    "quantization_config": (None,),
    "compression_config": (None,),
    "partial_rotary_factor": (None, 1.0),
    "rope_interleaved": (None, False),
    "attention_chunk_size": (None,),
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
    "length_penalty", "max_length", "max_window_layers", "min_length", "no_repeat_ngram_size",
    "num_beam_groups", "num_beams",
    "num_return_sequences", "output_attentions", "output_hidden_states", "output_scores", "pad_token_id",
    "prefix", "pretraining_tp", "problem_type", "remove_invalid_values", "repetition_penalty", "return_dict",
    "return_dict_in_generate", "sep_token_id", "suppress_tokens", "task_specific_params", "temperature",
    "tf_legacy_loss", "tie_encoder_decoder", "tokenizer_class", "top_k", "top_p", "torch_dtype",
    "torchscript", "transformers_version", "typical_p", "use_bfloat16", "use_cache",
})  # fmt: skip
# And those that nobody knows: transformers' classes take no notice of them; here they are named on stderr.

MAX_SIZE = 2**24
"""No size of a model is beyond it; a damaged file's might not fit anywhere."""
NULLABLE = {"num_key_value_heads", "head_dim"}
ROPE_KEYS = {"rope_type", "type", "rope_theta"}
ROPE_NAMES = {"original_context": "original_max_position_embeddings"}
"""What transformers calls values of `core.rope.KINDS` that have another name there."""


def stock_type(config: ModelConfig) -> str | None:
    """The `model_type` of transformers that computes this model; None: only the code of ours does."""
    if config.positions != "rope" or config.mlp != "swiglu":
        return None
    kinds = {
        (False, False, False): "llama", (True, False, False): "llama",
        (False, True, False): "qwen2", (False, False, True): "qwen3",
    }  # fmt: skip
    return kinds.get((config.biases, config.qkv_biases, config.qk_norm))


def hf_config(config: ModelConfig, bos: int | None, eos: int, dtype: str) -> Json:
    """The content of config.json. bos, eos: token ids; dtype: of the weights in the folder."""
    c, stock = config, stock_type(config)
    rope: Json = {"rope_type": "default"} if c.rope is None or stock is None else written_scaling(c.rope)
    # Releases before 5 know scaled positions by this name alone, and newer ones prefer it.
    scaled = {"rope_scaling": rope} if rope["rope_type"] != "default" else {}
    if stock:
        kind: Json = {"architectures": [STOCK[stock]], "model_type": stock}
        if stock != "llama":
            kind |= {"use_sliding_window": False, "sliding_window": None}
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
            "qkv_bias": c.biases or c.qkv_biases,
            "qk_norm": c.qk_norm,
            "scaled_rope": None if c.rope is None else multipliers(c),
        }
    return kind | {
        "vocab_size": c.vocab_size,
        "max_position_embeddings": c.context,
        "hidden_size": c.d_model,
        "intermediate_size": c.d_mlp,
        "num_hidden_layers": c.n_layers,
        "num_attention_heads": c.n_heads,
        "num_key_value_heads": c.kv_heads,
        "head_dim": c.head_size,
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
        **({"rope_parameters": rope | {"rope_theta": c.rope_theta}} if c.positions == "rope" else {}),
        **scaled,
        "torch_dtype": dtype,
        "dtype": dtype,
        "bos_token_id": bos,
        "eos_token_id": eos,
        "use_cache": True,
    }


def written_scaling(scaling: Scaling) -> Json:
    """As transformers writes it, without theta; what it would take for a default is left out."""
    values = {name: value for name, value in scaling.values if value != KINDS[scaling.kind][name]}
    if "truncate" in values:
        values["truncate"] = bool(values["truncate"])
    if "original_context" in values:
        values["original_context"] = int(values["original_context"])
    named = {ROPE_NAMES.get(name, name): value for name, value in values.items()}
    return {"rope_type": scaling.kind, **named}


def multipliers(config: ModelConfig) -> Json:
    """What the code of ours does with scaled positions: how they are written here, and the numbers."""
    scaling = config.rope
    numbers = scaling.multipliers(config.head_size, config.rope_theta).tolist()
    return {"scaling": str(scaling), "multipliers": numbers, "amplitude": scaling.amplitude}


def model_config(content: Json) -> ModelConfig:
    """The model that a config.json describes, what only training needs (dropout) left at its default.

    Raises:
        UserError: it lacks a size, has a value of the wrong type, or asks for what this decoder lacks.
    """
    kind = content.get("model_type")
    if kind not in (*STOCK, "mtlm"):
        raise UserError(
            f"config.json is of a {reprlib.repr(kind)} model, which is not computed here: there are "
            f"{', '.join(map(repr, STOCK))} and our own 'mtlm'"
        )
    ours, qwen = kind == "mtlm", kind in ("qwen2", "qwen3")
    for name, allowed in FIXED.items():
        if not _is_one_of(content.get(name), allowed):
            _refuse(f"{name} {reprlib.repr(content[name])}")
    if not ours and content.get("auto_map"):
        _refuse("code of its own (auto_map)")
    _require_full_attention(content, qwen)
    _name_unknown(frozenset(content.keys() - COMPUTED - FIXED.keys() - IRRELEVANT - {"auto_map"}))

    def size(name: str, default: int | None = None) -> int:
        return _read(content, name, default, _is_size, f"a whole number from 1 to {MAX_SIZE:,}")

    def number(name: str, default: float) -> float:
        # Ours has every key; transformers' defaults, which are those here, are a Llama's.
        known = None if ours else default
        return float(_read(content, name, known, _is_positive, "a positive number"))

    def flag(name: str, later: bool = False) -> bool:
        known = None if ours and not later else False  # later: our older exports have no such key
        return _read(content, name, known, lambda value: isinstance(value, bool), "true or false")

    def word(name: str, default: str | None) -> str:
        return _read(content, name, default, lambda value: isinstance(value, str), "a word")

    heads, width = size("num_attention_heads"), size("hidden_size")
    activation = word("hidden_act", None if ours else "silu")
    positions = word("positions", None) if ours else "rope"
    if qwen and "num_key_value_heads" not in content:  # their classes have a number of their own for it
        size("num_key_value_heads")
    kv_heads = size("num_key_value_heads", heads)
    # Qwen3's class does not divide: a head has 128 elements where nothing is said.
    head_dim = size("head_dim", 128 if kind == "qwen3" else max(1, width // heads))
    if kind == "qwen2":  # its class has them
        attention, qkv, mlp = False, True, False
    else:
        attention, mlp = flag("attention_bias"), flag("mlp_bias")
        qkv = ours and flag("qkv_bias", later=True)
    if heads % kv_heads:
        _refuse(f"{heads} heads of queries for {kv_heads} of keys and values, which is no multiple")
    if activation not in MLPS or (not ours and activation != "silu"):
        _refuse(f"the activation {reprlib.repr(activation)}")
    if positions not in ("rope", "learned"):
        _refuse(f"{reprlib.repr(positions)} positions")
    if attention != mlp:
        _refuse("biases in one of attention and MLP but not in the other")
    theta, scaling = _rope(content)
    return ModelConfig(
        vocab_size=size("vocab_size"),
        context=size("max_position_embeddings"),
        d_model=width,
        n_layers=size("num_hidden_layers"),
        n_heads=heads,
        n_kv_heads=kv_heads,
        head_dim=head_dim,
        d_mlp=size("intermediate_size"),
        positions=positions,
        mlp=MLPS[activation],
        biases=attention,
        qkv_biases=qkv and not attention,
        qk_norm=kind == "qwen3" or (ours and flag("qk_norm", later=True)),
        tied=flag("tie_word_embeddings"),
        rope_theta=theta,
        rope_scaling=scaling,
        norm_eps=number("rms_norm_eps", 1e-6),
        init_std=number("initializer_range", 0.02),
    )


def _require_full_attention(content: Json, qwen: bool) -> None:
    """Refuses windows that slide; Qwen's classes have a size for one that is not used."""
    window, used = content.get("sliding_window"), content.get("use_sliding_window", False)
    if window is not None and not (qwen and used is False):
        _refuse(f"sliding_window {reprlib.repr(window)}")
    if used is not False:
        _refuse(f"use_sliding_window {reprlib.repr(used)}")
    kinds = content.get("layer_types")
    if kinds is not None and not (isinstance(kinds, list) and all(k == "full_attention" for k in kinds)):
        _refuse(f"layer_types {reprlib.repr(kinds)}")


def _rope(content: Json) -> tuple[float, str | None]:
    """Theta of rotary positions, and how they are scaled, as `ModelConfig.rope_scaling` has it.

    transformers writes both into rope_parameters from release 5 on, before that theta next to a rope_scaling,
    which it prefers where both are there. All thetas must say the same.
    """
    scaling, thetas = None, []
    for name in ("rope_scaling", "rope_parameters"):
        rope = content.get(name)
        if rope is None:
            continue
        if not isinstance(rope, dict):
            _wrong(name, rope, "an object")
        if not rope:
            continue
        thetas.append((f"{name}.rope_theta", rope.get("rope_theta")))
        if scaling is None:
            scaling = _scaling(rope, name, content)
    thetas.append(("rope_theta", content.get("rope_theta")))
    given = {name: theta for name, theta in thetas if theta is not None}
    for name, theta in given.items():
        if not _is_positive(theta):
            _wrong(name, theta, "a positive number")
    if len(set(given.values())) > 1:
        said = " and ".join(f"{name} {theta}" for name, theta in given.items())
        raise UserError(f"config.json says {said}: leave the one that the model was trained with")
    ours = content.get("scaled_rope")
    if ours is not None:
        scaling = ours.get("scaling") if isinstance(ours, dict) else _wrong("scaled_rope", ours, "an object")
        if not isinstance(scaling, str):
            _wrong("scaled_rope.scaling", scaling, "a word")
    return float(next(iter(given.values()), 10_000.0)), scaling


def _scaling(rope: Json, name: str, content: Json) -> str:
    """How `rope`, the key `name`, scales rotary positions; "none" where it does not."""
    kind = rope.get("rope_type", rope.get("type", "default"))
    values = {key: value for key, value in rope.items() if key not in ROPE_KEYS and value is not None}
    if values.get("partial_rotary_factor") == 1.0:
        del values["partial_rotary_factor"]
    if kind == "default":
        if values:
            key = min(values)
            _refuse(f"{key} {reprlib.repr(values[key])} of rotary positions ({name})")
        return "none"
    if not (isinstance(kind, str) and kind in KINDS):
        _refuse(f"rotary positions scaled by {reprlib.repr(kind)} ({name})")
    original = ROPE_NAMES["original_context"]
    if "original_context" in KINDS[kind]:
        context = values.get(original, content.get("max_position_embeddings"))
        values[original] = content.get(original) or context
    if kind == "yarn":
        scales = (values.pop("mscale", None), values.pop("mscale_all_dim", None))
        if all(map(_is_positive, (*scales, values.get("factor")))) and "attention_factor" not in values:
            of_both = [0.1 * scale * math.log(max(values["factor"], 1)) + 1 for scale in scales]
            values["attention_factor"] = of_both[0] / of_both[1]
    names = {theirs: ours for ours, theirs in ROPE_NAMES.items()}
    return str(make_scaling(kind, {names.get(key, key): value for key, value in values.items()}))


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
