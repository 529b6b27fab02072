"""A few PTX instructions executed in Python: what look-up blocks are made of."""

from __future__ import annotations

from collections.abc import Callable, Sequence

MASK = (1 << 32) - 1


def prmt(a: int, b: int, selector: int) -> int:
    """Byte i is the byte of b:a that nibble i names, or with its top bit that byte's sign."""
    pool, made = a | b << 32, 0
    for i in range(4):
        nibble = selector >> 4 * i & 15
        byte = pool >> 8 * (nibble & 7) & 255
        made |= (255 * (byte >> 7) if nibble & 8 else byte) << 8 * i
    return made


def lop3(a: int, b: int, c: int, table: int) -> int:
    made = 0
    for i in range(8):
        if table >> i & 1:
            made |= (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
    return made


OPERATIONS: dict[str, Callable[..., int]] = {
    "prmt.b32": prmt,
    "lop3.b32": lop3,
    "and.b32": lambda a, b: a & b,
    "or.b32": lambda a, b: a | b,
    "shl.b32": lambda a, b: a << b,
    "shr.u32": lambda a, b: a >> b,
    "mul.lo.u32": lambda a, b: a * b,
    "mad.lo.u32": lambda a, b, c: a * b + c,
}


def execute(text: str, outputs: int, inputs: Sequence[int]) -> list[int]:
    """The registers $0, $1, ... that a block leaves, given those behind them."""
    registers = {f"${outputs + i}": value for i, value in enumerate(inputs)}
    for line in text.strip("{}\n").splitlines():
        opcode, rest = line.rstrip(";").split(" ", 1)
        if opcode == ".reg":
            continue
        target, *operands = rest.split(", ")
        given = [registers[o] if o in registers else int(o, 0) for o in operands]
        # Early clobber: no output may be written before all inputs were read by this block.
        assert target not in registers or not target.startswith("$"), line
        registers[target] = OPERATIONS[opcode](*given) & MASK
    return [registers[f"${i}"] for i in range(outputs)]
