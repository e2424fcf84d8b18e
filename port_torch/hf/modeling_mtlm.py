"""The MTLM decoder for transformers 4.57 and 5: RMSNorm before each branch, causal attention, an MLP.

Shapes: B batch, T new positions, S positions seen, D width, H heads, G heads of keys and values, K head size.
"""

import inspect

import torch
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.cache_utils import DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import can_return_tuple

from .configuration_mtlm import MtlmConfig


class MtlmRMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, in float32."""

    def __init__(self, size, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x):
        y = x.float()
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps)
        return (y * self.weight).to(x.dtype)


class MtlmAttention(nn.Module):
    """Causal self-attention over a cache of transformers, with rotary positions where there are any.

    The attention itself is the function that transformers has under the name `attn_implementation`.
    """

    is_causal = True

    def __init__(self, config, layer_idx):
        super().__init__()
        c, d, size = config, config.hidden_size, config.head_dim
        heads, kv_heads = c.num_attention_heads, c.num_key_value_heads
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = size
        self.num_key_value_groups = heads // kv_heads  # attention functions of transformers ask for it
        self.q_proj = nn.Linear(d, heads * size, bias=c.qkv_bias)
        self.k_proj = nn.Linear(d, kv_heads * size, bias=c.qkv_bias)
        self.v_proj = nn.Linear(d, kv_heads * size, bias=c.qkv_bias)
        self.o_proj = nn.Linear(heads * size, d, bias=c.attention_bias)
        self.q_norm = MtlmRMSNorm(size, c.rms_norm_eps) if c.qk_norm else None
        self.k_norm = MtlmRMSNorm(size, c.rms_norm_eps) if c.qk_norm else None

    def forward(self, x, slots, attention_mask, rotation, past_key_values, **kwargs):
        """What attention adds, [B, T, D], and its weights [B, H, T, S] where the implementation has them."""
        q, k, v = (
            m(x).view(*x.shape[:2], -1, self.head_dim).transpose(1, 2)
            for m in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if rotation is not None:
            q, k = rotate(q, *rotation), rotate(k, *rotation)
        if past_key_values is not None:
            # 4.57 writes into a cache of fixed size at slot 0 unless it is told where; 5 keeps count itself.
            k, v = past_key_values.update(k, v, self.layer_idx, {"cache_position": slots})
        attend = eager_attention_forward
        if self.config._attn_implementation != "eager":
            attend = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
        y, weights = attend(self, q, k, v, attention_mask, scaling=self.head_dim**-0.5, dropout=0.0, **kwargs)
        return self.o_proj(y.reshape(*x.shape[:2], -1)), weights


class MtlmMLP(nn.Module):
    """down(activation(up x)), the activation `hidden_act`; silu has a gate: down(silu(gate x) * up x)."""

    def __init__(self, config):
        super().__init__()
        d, f = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(d, f, bias=config.mlp_bias) if config.hidden_act == "silu" else None
        self.up_proj = nn.Linear(d, f, bias=config.mlp_bias)
        self.down_proj = nn.Linear(f, d, bias=config.mlp_bias)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, x):
        if self.gate_proj is None:
            return self.down_proj(self.act_fn(self.up_proj(x)))
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class MtlmDecoderLayer(GradientCheckpointingLayer):
    """x + attention(norm x), then x + mlp(norm x); gives the weights of attention, too."""

    def __init__(self, config, layer_idx):
        super().__init__()
        self.input_layernorm = MtlmRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = MtlmAttention(config, layer_idx)
        self.post_attention_layernorm = MtlmRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MtlmMLP(config)

    def forward(self, x, slots, attention_mask, rotation, past_key_values=None, **kwargs):
        normed = self.input_layernorm(x)
        y, weights = self.self_attn(normed, slots, attention_mask, rotation, past_key_values, **kwargs)
        x = x + y
        return x + self.mlp(self.post_attention_layernorm(x)), weights


class MtlmPreTrainedModel(PreTrainedModel):
    """What transformers has to know of both classes below."""

    config_class = MtlmConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ("MtlmDecoderLayer",)
    _skip_keys_device_placement = ("past_key_values",)
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    @classmethod
    def _can_set_attn_implementation(cls):
        """Otherwise transformers looks for words in this file, other ones in 4.57 and 5."""
        return True


class MtlmModel(MtlmPreTrainedModel):
    """Embeddings, layers and the final norm: hidden states [B, T, D]."""

    def __init__(self, config):
        super().__init__(config)
        c = config
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        if c.positions == "learned":
            self.embed_positions = nn.Embedding(c.max_position_embeddings, c.hidden_size)
        self.layers = nn.ModuleList(MtlmDecoderLayer(c, i) for i in range(c.num_hidden_layers))
        self.norm = MtlmRMSNorm(c.hidden_size, c.rms_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        use_cache=None,
        output_attentions=None,
        output_hidden_states=None,
        **kwargs,
    ):
        """position_ids: by default those of the tokens that `attention_mask` shows, counted from 0 behind
        padding. Further keyword arguments go to the attention function."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        if output_attentions is None:
            output_attentions = self.config.output_attentions
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        if output_attentions and self.config._attn_implementation != "eager":
            raise ValueError(
                f"attn_implementation {self.config._attn_implementation!r} gives no attention weights: "
                "call model.set_attn_implementation('eager') first"
            )
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache()
        # A slot is a place in the cache; behind padding on the left a token's position is another number.
        seen = 0 if past_key_values is None else past_key_values.get_seq_length()
        slots = torch.arange(x.shape[1], device=x.device) + seen
        learned = self.config.positions == "learned"
        if position_ids is None:
            position_ids = token_positions(slots, attention_mask)
            # No position is beyond its slot, so that mostly no value has to be looked at.
            if learned and seen + x.shape[1] > self.config.max_position_embeddings:
                require_within_context(position_ids, self.config.max_position_embeddings)
        elif learned:
            require_within_context(position_ids, self.config.max_position_embeddings)
        mask = causal_mask(self.config, x, attention_mask, slots, past_key_values, position_ids)
        rotation = None
        if learned:
            x = x + self.embed_positions(position_ids)
        else:
            rotation = rotary_angles(position_ids, self.config)
        hidden_states, attentions = [], []
        for layer in self.layers:
            hidden_states.append(x)
            x, weights = layer(
                x, slots, mask, rotation,
                past_key_values=past_key_values, position_ids=position_ids, **kwargs,
            )  # fmt: skip
            attentions.append(weights)
        x = self.norm(x)
        return BaseModelOutputWithPast(
            last_hidden_state=x,
            past_key_values=past_key_values if use_cache else None,
            hidden_states=(*hidden_states, x) if output_hidden_states else None,
            attentions=tuple(attentions) if output_attentions else None,
        )


class MtlmForCausalLM(MtlmPreTrainedModel, GenerationMixin):
    """The model with its head: logits [B, T, vocabulary], and a loss where labels are given."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012 (transformers' form)

    def __init__(self, config):
        super().__init__(config)
        self.model = MtlmModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,  # `generate` makes them only for a model that names them here
        past_key_values=None,
        inputs_embeds=None,
        labels=None,
        use_cache=None,
        logits_to_keep=0,
        **kwargs,
    ):
        """labels: ids to predict, shifted here; -100 is ignored. logits_to_keep: of how many last ones.

        The loss is a mean over the labels. `Trainer` takes `**kwargs` as a sign that the model divides by
        `num_items_in_batch`, the number of labels in all batches whose gradients it accumulates.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, keep])
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs
            )
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


def eager_attention_forward(module, query, key, value, attention_mask, scaling, **kwargs):
    """softmax(q k^T scaling + mask) v by its formula: [B, T, H, K], and the weights [B, H, T, S]."""
    if module.num_key_value_groups > 1:
        key, value = (t.repeat_interleave(module.num_key_value_groups, dim=1) for t in (key, value))
    scores = (query @ key.mT) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask[..., : key.shape[-2]]
    weights = scores.softmax(-1, dtype=torch.float32).to(query.dtype)
    return (weights @ value).transpose(1, 2).contiguous(), weights


def token_positions(slots, attention_mask):
    """Positions [B or 1, T] of the tokens in `slots`: how many tokens `attention_mask` [B, S] shows before
    each; without one, or with a mask of four dimensions, which is made already, the slots themselves."""
    if attention_mask is None or attention_mask.dim() != 2:
        return slots[None]
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -slots.shape[0] :]


def require_within_context(position_ids, context):
    """A ValueError unless every position has a row in the table; a GPU would end the process instead."""
    if torch.compiler.is_compiling() or (position_ids.is_cuda and torch.cuda.is_current_stream_capturing()):
        return
    last = int(position_ids.max())
    if last >= context:
        raise ValueError(
            f"position {last} is beyond this model's context of {context} tokens: its positions are learned, "
            "so give it shorter sequences, or generate fewer tokens"
        )


def causal_mask(config, embeds, attention_mask, slots, past_key_values, position_ids):
    """What each new token sees, in the form that `attn_implementation` takes."""
    given = {
        "config": config,
        "attention_mask": attention_mask,
        "past_key_values": past_key_values,
        "position_ids": position_ids,
        # Releases before 5 ask for the slots, and name the embeddings otherwise.
        "cache_position": slots,
        "input_embeds": embeds,
        "inputs_embeds": embeds,
    }
    known = inspect.signature(create_causal_mask).parameters
    return create_causal_mask(**{name: value for name, value in given.items() if name in known})


def rotary_angles(positions, config):
    """cos and sin [B, 1, T, K/2] of position * theta^(-2i/K), float32; made anew, no buffer to load."""
    half = config.head_dim // 2
    step = torch.arange(half, dtype=torch.float32, device=positions.device) / half
    frequency, scaled = config.rope_theta**-step, config.scaled_rope
    if scaled is not None:
        frequency = frequency * torch.tensor(scaled["multipliers"], device=frequency.device)
    angle = (positions.float()[..., None] * frequency)[:, None]
    cos, sin = angle.cos(), angle.sin()
    return (cos, sin) if scaled is None else (cos * scaled["amplitude"], sin * scaled["amplitude"])


def rotate(x, cos, sin):
    """Rotary embedding in the half-split layout: element i turns with element i + K/2."""
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)
