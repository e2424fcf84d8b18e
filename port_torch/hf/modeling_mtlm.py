"""The MTLM decoder for transformers 4.57 and 5: RMSNorm before each branch, causal attention, an MLP.

Shapes: B batch, T new positions, S positions seen, D width, H heads, K head size.
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import DynamicCache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from .configuration_mtlm import MtlmConfig


class MtlmRMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, in float32."""

    def __init__(self, config):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config.hidden_size))
        self.eps = config.rms_norm_eps

    def forward(self, x):
        y = x.float()
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps)
        return (y * self.weight).to(x.dtype)


class MtlmAttention(nn.Module):
    """Causal self-attention over a cache of transformers, with rotary positions where there are any."""

    def __init__(self, config, layer_idx):
        super().__init__()
        d = config.hidden_size
        self.q_proj = nn.Linear(d, d, bias=config.attention_bias)
        self.k_proj = nn.Linear(d, d, bias=config.attention_bias)
        self.v_proj = nn.Linear(d, d, bias=config.attention_bias)
        self.o_proj = nn.Linear(d, d, bias=config.attention_bias)
        self.n_heads = config.num_attention_heads
        self.layer_idx = layer_idx

    def forward(self, x, slots, attention_mask, rotation, past_key_values):
        b, t, d = x.shape
        q, k, v = (
            m(x).view(b, t, self.n_heads, -1).transpose(1, 2)
            for m in (self.q_proj, self.k_proj, self.v_proj)
        )  # fmt: skip
        if rotation is not None:
            q, k = rotate(q, *rotation), rotate(k, *rotation)
        if past_key_values is not None:
            # 4.57 writes into a cache of fixed size at slot 0 unless it is told where; 5 keeps count itself.
            k, v = past_key_values.update(k, v, self.layer_idx, {"cache_position": slots})
        visible = visible_slots(slots, k.shape[2], attention_mask)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, is_causal=visible is None)
        return self.o_proj(y.transpose(1, 2).reshape(b, t, d))


class MtlmMLP(nn.Module):
    """SwiGLU where `hidden_act` is silu, GELU in its tanh form otherwise."""

    def __init__(self, config):
        super().__init__()
        d, f = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(d, f, bias=config.mlp_bias) if config.hidden_act == "silu" else None
        self.up_proj = nn.Linear(d, f, bias=config.mlp_bias)
        self.down_proj = nn.Linear(f, d, bias=config.mlp_bias)

    def forward(self, x):
        if self.gate_proj is None:
            return self.down_proj(F.gelu(self.up_proj(x), approximate="tanh"))
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class MtlmDecoderLayer(GradientCheckpointingLayer):
    """x + attention(norm x), then x + mlp(norm x)."""

    def __init__(self, config, layer_idx):
        super().__init__()
        self.input_layernorm = MtlmRMSNorm(config)
        self.self_attn = MtlmAttention(config, layer_idx)
        self.post_attention_layernorm = MtlmRMSNorm(config)
        self.mlp = MtlmMLP(config)

    def forward(self, x, slots, attention_mask, rotation, past_key_values=None):
        x = x + self.self_attn(self.input_layernorm(x), slots, attention_mask, rotation, past_key_values)
        return x + self.mlp(self.post_attention_layernorm(x))


class MtlmPreTrainedModel(PreTrainedModel):
    """What transformers has to know of both classes below."""

    config_class = MtlmConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ("MtlmDecoderLayer",)
    _skip_keys_device_placement = ("past_key_values",)
    _supports_sdpa = True


class MtlmModel(MtlmPreTrainedModel):
    """Embeddings, layers and the final norm: hidden states [B, T, D]."""

    def __init__(self, config):
        super().__init__(config)
        c = config
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        if c.positions == "learned":
            self.embed_positions = nn.Embedding(c.max_position_embeddings, c.hidden_size)
        self.layers = nn.ModuleList(MtlmDecoderLayer(c, i) for i in range(c.num_hidden_layers))
        self.norm = MtlmRMSNorm(c)
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
        output_hidden_states=False,
        **kwargs,
    ):
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache()
        # A slot is a place in the cache; behind padding on the left a token's position is another number.
        seen = 0 if past_key_values is None else past_key_values.get_seq_length()
        slots = torch.arange(x.shape[1], device=x.device) + seen
        if position_ids is None:
            position_ids = slots[None]
        rotation = None
        if self.config.positions == "learned":
            x = x + self.embed_positions(position_ids)
        else:
            rotation = rotary_angles(position_ids, self.config)
        hidden_states = []
        for layer in self.layers:
            hidden_states.append(x)
            x = layer(x, slots, attention_mask, rotation, past_key_values=past_key_values)
        x = self.norm(x)
        return BaseModelOutputWithPast(
            last_hidden_state=x,
            past_key_values=past_key_values if use_cache else None,
            hidden_states=(*hidden_states, x) if output_hidden_states else None,
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
        """labels: ids to predict, shifted here; -100 is ignored. logits_to_keep: of how many last ones."""
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
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
        )


def visible_slots(slots, n_slots, attention_mask):
    """What each new token sees, [B or 1, 1, T, S] bool; None: all before it, without a cache or padding.

    slots: places of the new tokens among the `n_slots` of the cache. attention_mask: [B, S], 0 for padding;
    or the four-dimensional mask that transformers has made for a cache of fixed size.
    """
    if attention_mask is not None and attention_mask.dim() == 4:
        return attention_mask[..., :n_slots]
    if attention_mask is None and n_slots == slots.shape[0]:
        return None
    columns = torch.arange(n_slots, device=slots.device)
    visible = (columns <= slots[:, None])[None, None]
    if attention_mask is not None:
        present = F.pad(attention_mask.bool(), (0, n_slots - attention_mask.shape[1]))[:, None, None]
        # Padding sees itself, so that no row of the softmax is empty.
        visible = visible & (present | (columns == slots[:, None]))
    return visible


def rotary_angles(positions, config):
    """cos and sin [B, 1, T, K/2] of position * theta^(-2i/K), float32; made anew, no buffer to load."""
    half = config.hidden_size // config.num_attention_heads // 2
    step = torch.arange(half, dtype=torch.float32, device=positions.device) / half
    angle = (positions.float()[..., None] * config.rope_theta**-step)[:, None]
    return angle.cos(), angle.sin()


def rotate(x, cos, sin):
    """Rotary embedding in the half-split layout: element i turns with element i + K/2."""
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)
