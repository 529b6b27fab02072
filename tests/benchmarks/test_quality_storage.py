"""Bits of the peers' formats, against sizes worked out by hand or packed here."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.quality.peers.gguf_model import from_llama, tensor_name, to_llama
from benchmarks.quality.peers.storage import gptq_bits, hqq_bits, loftq_bits, nf4_bits
from tests import models

ROWS, COLUMNS = 8, 128
WEIGHTS = ROWS * COLUMNS


def test_nf4_has_a_float_per_block_and_with_double_quantization_a_byte() -> None:
    codes, blocks = 4 * WEIGHTS, WEIGHTS // 64
    assert nf4_bits(ROWS, COLUMNS, 64, double=False) == codes + 32 * blocks
    assert nf4_bits(ROWS, COLUMNS, 64, double=True) == codes + 8 * blocks + 32 + 32
    assert nf4_bits(1024, 1024, 64, double=False) / 1024**2 == 4.5


def test_nf4_counts_the_unfilled_block_and_byte() -> None:
    assert nf4_bits(1, 65, 64, double=False) == 8 * 33 + 2 * 32


def test_loftq_has_a_float_per_block() -> None:
    assert loftq_bits(ROWS, COLUMNS, 2, 64) == 2 * WEIGHTS + 32 * 16


def test_hqq_has_two_halves_per_group() -> None:
    assert hqq_bits(ROWS, COLUMNS, 4, 64, 1) == 4 * WEIGHTS + 32 * 16
    assert hqq_bits(ROWS, COLUMNS, 1, 64, 0) == 1 * WEIGHTS + 32 * 16


def test_hqq_packs_three_bits_ten_to_a_word() -> None:
    """16 groups of 64: two words per position along the groups, seven per group across them."""
    assert hqq_bits(ROWS, COLUMNS, 3, 64, 1) == 32 * 2 * 64 + 32 * 16
    assert hqq_bits(ROWS, COLUMNS, 3, 64, 0) == 32 * 7 * 16 + 32 * 16


def test_gptq_packs_codes_and_zeros_into_words() -> None:
    codes, scales, zeros = 2 * WEIGHTS, 16 * 2 * ROWS, 2 * 32  # 8 zeros of 2 bits: one word a group
    assert gptq_bits(ROWS, COLUMNS, 2, 64) == codes + scales + zeros
    ordered = gptq_bits(ROWS, COLUMNS, 2, 64, order=True)
    assert ordered == codes + scales + zeros + 32 * COLUMNS


def test_gptq_at_two_bits_costs_what_its_users_know() -> None:
    assert gptq_bits(576, 576, 2, 64) / 576**2 == pytest.approx(2 + 16 / 64 + 2 / 64)


@given(st.integers(1, 40), st.integers(1, 300), st.sampled_from([2, 3, 4]))
def test_no_format_stores_less_than_its_codes(n: int, k: int, bits: int) -> None:
    assert gptq_bits(n, k, bits, 64) >= n * k * bits + 16 * n * math.ceil(k / 64)
    assert nf4_bits(n, k, 64, double=True) < nf4_bits(n, k, 64, double=False) + 64


def test_rows_reach_llama_cpps_order_and_come_back() -> None:
    """The rotary halves of a head, 0 1 2 3 | 4 5 6 7, lie there as pairs 0 4 1 5 2 6 3 7."""
    model = models.tiny_llama()
    size = model.config.hidden_size // model.config.num_attention_heads
    name = "model.layers.0.self_attn.k_proj"
    rows = torch.arange(2 * size, dtype=torch.float32)[:, None]
    stored = to_llama(name, rows, model)
    assert stored[:4, 0].tolist() == [0, size // 2, 1, size // 2 + 1]
    assert from_llama(name, stored, model).equal(rows)
    assert to_llama("model.layers.0.mlp.up_proj", rows, model).equal(rows)


def test_modules_have_llama_cpps_names() -> None:
    assert tensor_name("model.layers.12.self_attn.o_proj") == "blk.12.attn_output.weight"
    assert tensor_name("model.embed_tokens") == "token_embd.weight"
    with pytest.raises(ValueError, match=r"transformer\.h\.0"):
        tensor_name("transformer.h.0.attn")
