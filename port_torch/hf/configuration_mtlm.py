"""The sizes of an MTLM decoder, for transformers 4.57 and 5."""

from transformers import PretrainedConfig


class MtlmConfig(PretrainedConfig):
    """Llama's fields, and some more. `hidden_act` says which MLP it has.

    positions: "rope" or "learned". num_key_value_heads, head_dim: None as Llama has it. qkv_bias: biases of
    queries, keys and values; None: as attention_bias, which is that of the output. qk_norm: RMSNorm of every
    query and key over its head. scaled_rope: what frequencies, cos and sin are multiplied by.
    """

    model_type = "mtlm"
    keys_to_ignore_at_inference = ("past_key_values",)

    def __init__(
        self,
        vocab_size=32_000,
        max_position_embeddings=1024,
        hidden_size=384,
        intermediate_size=1024,
        num_hidden_layers=11,
        num_attention_heads=6,
        num_key_value_heads=None,
        head_dim=None,
        positions="learned",
        hidden_act="gelu_pytorch_tanh",
        attention_bias=True,
        qkv_bias=None,
        qk_norm=False,
        mlp_bias=True,
        rms_norm_eps=1e-6,
        rope_theta=10_000.0,
        scaled_rope=None,
        initializer_range=0.02,
        tie_word_embeddings=False,
        use_cache=True,
        bos_token_id=1,
        eos_token_id=2,
        **kwargs,
    ):
        self.vocab_size = vocab_size
        self.max_position_embeddings = max_position_embeddings
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_attention_heads if num_key_value_heads is None else num_key_value_heads
        self.head_dim = hidden_size // num_attention_heads if head_dim is None else head_dim
        self.positions = positions
        self.hidden_act = hidden_act
        self.attention_bias = attention_bias
        self.qkv_bias = attention_bias if qkv_bias is None else qkv_bias
        self.qk_norm = qk_norm
        self.mlp_bias = mlp_bias
        self.rms_norm_eps = rms_norm_eps
        self.rope_theta = rope_theta
        self.scaled_rope = scaled_rope
        self.initializer_range = initializer_range
        self.use_cache = use_cache
        super().__init__(
            tie_word_embeddings=tie_word_embeddings,
            bos_token_id=bos_token_id,
            eos_token_id=eos_token_id,
            **kwargs,
        )
