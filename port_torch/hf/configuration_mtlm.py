"""The sizes of an MTLM decoder, for transformers 4.57 and 5."""

from transformers import PretrainedConfig


class MtlmConfig(PretrainedConfig):
    """Llama's fields, and `positions`: "rope" or "learned". `hidden_act` says which MLP it has."""

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
        positions="learned",
        hidden_act="gelu_pytorch_tanh",
        attention_bias=True,
        mlp_bias=True,
        rms_norm_eps=1e-6,
        rope_theta=10_000.0,
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
        self.positions = positions
        self.hidden_act = hidden_act
        self.attention_bias = attention_bias
        self.mlp_bias = mlp_bias
        self.rms_norm_eps = rms_norm_eps
        self.rope_theta = rope_theta
        self.initializer_range = initializer_range
        self.use_cache = use_cache
        super().__init__(
            tie_word_embeddings=tie_word_embeddings,
            bos_token_id=bos_token_id,
            eos_token_id=eos_token_id,
            **kwargs,
        )
