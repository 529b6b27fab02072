"""The input rotation is the orthogonal matrix H D, the same on every machine."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lowra.compiler.rotation import (
    Rotation,
    largest_block,
    rotate,
    rotate_gram,
    signs,
    unrotate,
)
from tests.compiler.packed_weights import hadamard

SIZES = [(1, 1), (2, 2), (8, 8), (24, 8), (64, 64), (96, 32), (40, 4)]


def matrix(k: int, rotation: Rotation) -> torch.Tensor:
    """R float64 [k, k] with rotate(x) = x R'."""
    return rotate(torch.eye(k, dtype=torch.float64), rotation).T


@pytest.mark.parametrize(("k", "block"), SIZES)
def test_rotation_is_the_hadamard_matrix_times_the_signs(k: int, block: int) -> None:
    if block == 1:
        assert torch.equal(matrix(k, Rotation(3, block)), torch.eye(k, dtype=torch.float64))
        return
    torch.testing.assert_close(matrix(k, Rotation(3, block)), hadamard(block, k, 3))


@pytest.mark.parametrize(("k", "block"), SIZES)
def test_rotation_is_orthogonal(k: int, block: int) -> None:
    r = matrix(k, Rotation(1, block))
    torch.testing.assert_close(r @ r.T, torch.eye(k, dtype=torch.float64))


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.integers(1, 7), st.integers(1, 5), st.integers(0, 9), st.integers(0, 3))
def test_unrotate_undoes_rotate(power: int, odd: int, seed: int, rows: int) -> None:
    block = 1 << power
    x = torch.randn(rows, block * odd, generator=torch.Generator().manual_seed(seed))
    rotation = Rotation(seed, block)
    torch.testing.assert_close(unrotate(rotate(x, rotation), rotation), x)
    torch.testing.assert_close(rotate(unrotate(x, rotation), rotation), x)


def test_rotated_weight_times_rotated_input_is_the_same_product() -> None:
    w, x = torch.randn(5, 96, dtype=torch.float64), torch.randn(7, 96, dtype=torch.float64)
    rotation = Rotation(9, 32)
    torch.testing.assert_close(rotate(x, rotation) @ rotate(w, rotation).T, x @ w.T)


@pytest.mark.parametrize(("k", "block"), SIZES)
def test_rotated_gram_is_r_g_r_transposed(k: int, block: int) -> None:
    x = torch.randn(50, k, dtype=torch.float64)
    gram, r = x.T @ x / 50, matrix(k, Rotation(2, block))
    torch.testing.assert_close(rotate_gram(gram, Rotation(2, block)), r @ gram @ r.T)


@pytest.mark.parametrize(
    ("k", "block"),
    [(1, 1), (33, 1), (64, 64), (576, 64), (1536, 512), (11008, 256), (4096, 4096), (16384, 4096)],
)
def test_largest_block_is_the_largest_power_of_two_that_divides_k(k: int, block: int) -> None:
    assert largest_block(k) == block


def test_signs_are_pinned() -> None:
    """splitmix64: a change here would make every stored checkpoint wrong."""
    pinned = {
        0: "-++-+++-+-+-----+-+----+",
        1: "++-+--+-+-++-+-+++-+--+-",
        2**40: "++--+----+-+++-++--++-+-",
    }
    for seed, text in pinned.items():
        assert "".join("+" if sign > 0 else "-" for sign in signs(seed, 24)) == text


def test_signs_follow_splitmix64_in_plain_integers() -> None:
    mask = (1 << 64) - 1

    def sign(seed: int, i: int) -> float:
        z = (seed * 0xD1B54A32D192ED03 + (i + 1) * 0x9E3779B97F4A7C15) & mask
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        return -1.0 if (z ^ (z >> 31)) >> 63 else 1.0

    for seed in (0, 7, 123456789):
        assert signs(seed, 100).tolist() == [sign(seed, i) for i in range(100)]


def test_signs_of_a_longer_input_start_with_those_of_a_shorter_one() -> None:
    assert torch.equal(signs(4, 300)[:70], signs(4, 70))


def test_signs_are_a_copy_that_may_be_written_to() -> None:
    before = signs(5, 16).clone()
    signs(5, 16).zero_()
    assert torch.equal(signs(5, 16), before)


def test_block_of_one_is_no_rotation() -> None:
    x = torch.randn(3, 10)
    assert not Rotation(8, 1).active
    assert torch.equal(rotate(x, Rotation(8, 1)), x)
    assert torch.equal(unrotate(x, Rotation(8, 1)), x)


def test_blocks_do_not_mix() -> None:
    x = torch.zeros(1, 48)
    x[0, 16:32] = torch.randn(16)
    rotated = rotate(x, Rotation(0, 16))
    assert not rotated[0, :16].any() and not rotated[0, 32:].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rotation_keeps_dtype_shape_and_length(dtype: torch.dtype) -> None:
    x = torch.randn(2, 3, 64, dtype=dtype)
    rotated = rotate(x, Rotation(0, 64))
    assert rotated.dtype == dtype and rotated.shape == x.shape
    torch.testing.assert_close(rotated.norm(dim=-1), x.norm(dim=-1))
