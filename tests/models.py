"""Tiny random models, one function each: float32, seed 0, eval mode, made from a config alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

VOCAB = 128
Model = TypeVar("Model", bound=nn.Module)


def _seeded(build: Callable[[], Model]) -> Model:
    """`build()` under seed 0, in eval mode; the caller's random state is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build().to(torch.float32).eval()


def tiny_llama(tied: bool = False, layers: int = 2) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=tied,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return _seeded(lambda: LlamaForCausalLM(config))


def tiny_gpt2() -> GPT2LMHeadModel:
    config = GPT2Config(
        vocab_size=VOCAB,
        n_positions=128,
        n_embd=64,
        n_layer=2,
        n_head=4,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return _seeded(lambda: GPT2LMHeadModel(config))


def tiny_bert() -> BertForMaskedLM:
    config = BertConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        pad_token_id=0,
    )
    return _seeded(lambda: BertForMaskedLM(config))


def tiny_t5() -> T5ForConditionalGeneration:
    config = T5Config(
        vocab_size=VOCAB,
        d_model=64,
        d_kv=16,
        d_ff=96,
        num_layers=2,
        num_decoder_layers=2,
        num_heads=4,
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
    )
    return _seeded(lambda: T5ForConditionalGeneration(config))


def tiny_bart() -> BartForConditionalGeneration:
    config = BartConfig(
        vocab_size=VOCAB,
        d_model=64,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=96,
        decoder_ffn_dim=96,
        max_position_embeddings=128,
        bos_token_id=0,
        pad_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=2,
        forced_eos_token_id=2,
    )
    return _seeded(lambda: BartForConditionalGeneration(config))


def tiny_mixtral() -> MixtralForCausalLM:
    config = MixtralConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=128,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return _seeded(lambda: MixtralForCausalLM(config))


class PlainMlp(nn.Module):
    """Two linears of odd sizes, with bias: what a kernel or a packer likes least."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(33, 47)
        self.down = nn.Linear(47, 20)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x)))


def plain_mlp() -> PlainMlp:
    return _seeded(PlainMlp)


def tokens(model: nn.Module, batch: int = 2, length: int = 8, seed: int = 0) -> dict[str, Tensor]:
    """The keyword arguments of one forward: random tokens, none padded.

    A model without a vocabulary (`plain_mlp`) gets random features of its first linear's width.
    """
    generator = torch.Generator().manual_seed(seed)
    config = getattr(model, "config", None)
    if config is None:
        k = next(m.in_features for m in model.modules() if isinstance(m, nn.Linear))
        return {"x": torch.randn(batch, length, k, generator=generator)}

    def draw() -> Tensor:  # the first ids are special tokens
        return torch.randint(3, config.vocab_size, (batch, length), generator=generator)

    ids = draw()
    kwargs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if config.is_encoder_decoder:
        kwargs["decoder_input_ids"] = draw()
    return kwargs
