"""A llama-like model as a dense GGUF file, as far as llama.cpp's quantizer reads it: no vocabulary.

llama.cpp stores the rows of q and k in another order (its rotary embedding pairs neighbours, that
of transformers pairs halves of a head), so both directions are here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

_PARTS = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}  # fmt: skip
_WHOLE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def tensor_name(module: str) -> str:
    """llama.cpp's name of the weight of `module`: model.layers.0.mlp.up_proj is blk.0.ffn_up."""
    if module in _WHOLE:
        return f"{_WHOLE[module]}.weight"
    prefix, layer, part = module.removeprefix("model.").split(".", 2)
    if prefix != "layers" or part not in _PARTS:
        raise ValueError(f"{module} is no part of a llama model")
    return f"blk.{layer}.{_PARTS[part]}.weight"


def to_llama(module: str, weight: Tensor, model: Any) -> Tensor:
    """`weight` [n, k] with its rows in llama.cpp's order."""
    heads = _heads(module, model)
    if heads is None:
        return weight
    n, k = weight.shape
    return weight.reshape(heads, 2, n // heads // 2, k).transpose(1, 2).reshape(n, k)


def from_llama(module: str, weight: Tensor, model: Any) -> Tensor:
    """`weight` [n, k] with its rows in transformers' order; undoes `to_llama`."""
    heads = _heads(module, model)
    if heads is None:
        return weight
    n, k = weight.shape
    return weight.reshape(heads, n // heads // 2, 2, k).transpose(1, 2).reshape(n, k)


def write_gguf(model: nn.Module, path: Path) -> None:
    """Write `model`, of llama's architecture, with float32 tensors."""
    import gguf

    config: Any = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    for name, parameter in model.named_parameters():
        module = name.removesuffix(".weight")
        weight = to_llama(module, parameter.detach().float(), model)
        writer.add_tensor(tensor_name(module), np.ascontiguousarray(weight.numpy()))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _heads(module: str, model: Any) -> int | None:
    if module.endswith("self_attn.q_proj"):
        return model.config.num_attention_heads
    if module.endswith("self_attn.k_proj"):
        return model.config.num_key_value_heads
    return None
