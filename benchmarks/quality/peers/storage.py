"""Bits that other formats store for a weight [n, k], counted from their layouts."""

from __future__ import annotations


def nf4_bits(n: int, k: int, block: int, double: bool) -> int:
    """bitsandbytes 4-bit: codes, and per block of `block` weights an absmax.

    The absmax is a float32; with `double` quantization it is a byte, beside a float32 per 256
    blocks and one float32 offset. The tables of NF4 and of the 8-bit map are constants of the
    library (also written to its checkpoints): not counted.
    """
    blocks = -(-n * k // block)
    codes = 8 * -(-n * k // 2)
    if not double:
        return codes + 32 * blocks
    return codes + 8 * blocks + 32 * -(-blocks // 256) + 32


def loftq_bits(n: int, k: int, bits: int, block: int) -> int:
    """peft's NFQuantizer: codes packed into bytes, and a float32 absmax per block."""
    return n * k * bits + 32 * (n * k // block)


def hqq_bits(n: int, k: int, bits: int, group: int, axis: int) -> int:
    """HQQ: codes as it packs them, and a float16 scale and zero per `group` weights.

    4, 2 and 1 bits fill bytes; 3 bits go ten to an int32, along the groups (`axis` 1) or along the
    members of a group (`axis` 0), padded to a multiple of ten.
    """
    groups = n * k // group
    if bits != 3:
        return n * k * bits + 32 * groups
    packed, other = (groups, group) if axis == 1 else (group, groups)
    return 32 * -(-packed // 10) * other + 32 * groups


def gptq_bits(n: int, k: int, bits: int, group: int, *, order: bool = False) -> int:
    """The GPTQ layout, which AutoRound writes too: int32 words of codes down the columns of a
    group, float16 scales and packed zeros per group; with `order` an int32 group index per column.

    The group index is redundant without activation order, and not counted there.
    """
    groups = -(-k // group)
    codes = 32 * -(-k * bits // 32) * n
    zeros = 32 * -(-n * bits // 32) * groups
    return codes + 16 * groups * n + zeros + (32 * k if order else 0)
