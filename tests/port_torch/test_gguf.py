"""Downstream of the MTLM1 folder: GGUF, written with the `gguf` package, run by llama.cpp.

It needs `pip install gguf llama-cpp-python`; the latter is compiled from source, which takes minutes, so they
are not among the packages of this project.
"""

from pathlib import Path

import numpy as np
import pytest

from core.generation import Generator
from core.model import Compute
from core.sampling import Sampling
from core.tokenizer import load_tokenizer
from port_torch.folder import Folder, open_folder
from tests.port_torch.trained import open_run, train
from tests.train_tpu.processes import run

pytestmark = pytest.mark.slow
NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip


def write_gguf(folder: Folder, path: Path) -> None:
    """The folder as llama.cpp wants it: rotary pairs lie side by side, so the rows of q and k move."""
    gguf = pytest.importorskip("gguf", reason="pip install gguf")
    from sentencepiece import sentencepiece_model_pb2

    c = folder.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(c["max_position_embeddings"])
    writer.add_embedding_length(c["hidden_size"])
    writer.add_block_count(c["num_hidden_layers"])
    writer.add_feed_forward_length(c["intermediate_size"])
    writer.add_head_count(c["num_attention_heads"])
    writer.add_rope_dimension_count(c["head_dim"])
    writer.add_rope_freq_base(c["rope_theta"])
    writer.add_layer_norm_rms_eps(c["rms_norm_eps"])
    writer.add_vocab_size(c["vocab_size"])
    model = sentencepiece_model_pb2.ModelProto.FromString((folder.path / "tokenizer.model").read_bytes())
    writer.add_tokenizer_model("llama")
    writer.add_token_list([piece.piece.encode() for piece in model.pieces])
    writer.add_token_scores([piece.score for piece in model.pieces])
    writer.add_token_types([piece.type for piece in model.pieces])  # both count as sentencepiece does
    writer.add_bos_token_id(c["bos_token_id"])
    writer.add_eos_token_id(c["eos_token_id"])
    for name in folder.tensors:
        values = folder.read_float32(name)
        if "q_proj" in name or "k_proj" in name:
            rows = values.reshape(c["num_attention_heads"], 2, c["head_dim"] // 2, -1)
            values = np.ascontiguousarray(rows.swapaxes(1, 2)).reshape(values.shape)
        stem = name.removesuffix(".weight")
        if stem.startswith("model.layers."):
            number, _, module = stem.removeprefix("model.layers.").partition(".")
            stem = f"blk.{number}.{NAMES[module]}"
        else:
            stem = NAMES[stem]
        writer.add_tensor(f"{stem}.weight", values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_llama_cpp_goes_on_like_flax(tmp_path: Path, cache: Path, text: Path):
    llama_cpp = pytest.importorskip("llama_cpp", reason="pip install llama-cpp-python")
    out = train(cache, text, "llama", tokenizer="mistral")
    run(cache, out, tmp_path / "folder", module="port_torch.convert")
    write_gguf(open_folder(tmp_path / "folder"), tmp_path / "model.gguf")
    config, params = open_run(out)
    tokenizer = load_tokenizer("mistral")
    prompts = [f"Document {i}: the square of" for i in range(20)]
    ids = [[tokenizer.bos, *map(int, tokenizer.encode(prompt))] for prompt in prompts]
    expected = Generator(config, Compute()).complete(params, ids, Sampling(temperature=0), 32)
    llama = llama_cpp.Llama(str(tmp_path / "model.gguf"), n_ctx=config.context, verbose=False)
    for prompt, tokens, continuation in zip(prompts, ids, expected, strict=True):
        assert llama.tokenize(prompt.encode()) == tokens
        llama.reset()
        made = llama.generate(tokens, temp=0.0, top_k=1, repeat_penalty=1.0)
        assert [next(made) for _ in range(32)] == continuation
