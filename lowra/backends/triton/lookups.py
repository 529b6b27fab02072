"""Codes -> values in registers, as PTX: byte permutes as tables.

`prmt d, a, b, s` picks each byte of d among the 8 bytes of a and b, by a nibble of s: a table of
four halves for two weights at a time, or of 8 bytes for four. A block reads the words w0 and w1 of
neighbouring columns of one plane and gives, per field, one register with both halves side by side,
which is how tensor cores want their operand (docs/storage-format.md has the order of fields). Half
0 of a word is its low 16 bits: the first 128 columns of a tile of 256.

Triton does not promise which elements a block gets. Every value depends on its own word alone, and
with `own` (a codebook per row) on the table that comes with that word, so the order is no matter.
"""

from __future__ import annotations

from dataclasses import dataclass, field

SAME_LEVELS = {11: 2, 12: 3, 13: 4}
"""Trellis codes, and plain ones with as many levels: numbers of the levels are looked up alike."""
TABLE_WORDS = {1: 2, 2: 2, 3: 4, 4: 8, 9: 2, 11: 2, 12: 4, 13: 8}
"""Registers of a table by width id, as `table_lines` of tables.py fills them."""

INTERLEAVE = ("0x5140", "0x7362")
"""By half: bytes [w0, w1, w0, w1], the two lower or the two upper ones of both words."""
FIRST_TWO = "0x7610"  # bytes 0 and 1 of a, 2 and 3 of b
EVEN, ODD = "0x6240", "0x7351"  # bytes 0, 2 of a with 0, 2 of b in turn; then 1 and 3


@dataclass(frozen=True)
class LookUp:
    """One inline assembly block.

    fields: values per word. pack: neighbouring elements that it takes at a time.
    """

    name: str
    text: str
    constraints: str
    tables: int
    words: int
    fields: int
    pack: int


@dataclass
class _Block:
    """PTX under construction: operands are numbered outputs, tables, words."""

    outputs: int
    tables: int
    pack: int
    own: bool
    lines: list[str] = field(default_factory=list[str])
    registers: int = 0

    def new(self) -> str:
        self.registers += 1
        return f"r{self.registers}"

    def op(self, opcode: str, *operands: str) -> str:
        target = self.new()
        self.to(target, opcode, *operands)
        return target

    def to(self, target: str, opcode: str, *operands: str) -> None:
        self.lines.append(f"{opcode} {target}, {', '.join(operands)};")

    def table(self, index: int, element: int) -> str:
        return f"${self.outputs + self.pack * index + element}"

    def word(self, index: int) -> str:
        return f"${self.outputs + self.pack * self.tables + index}"

    def pick(self, a: int, b: int, selector: str, target: str = "", element: int = 0) -> str:
        """Bytes of tables a and b: bytes 0 and 1 for `element`, 2 and 3 for the next one."""
        target = target or self.new()
        first = [self.table(t, element) for t in (a, b)]
        if not self.own:
            self.to(target, "prmt.b32", *first, selector)
            return target
        second = [self.table(t, element + 1) for t in (a, b)]
        low = self.op("prmt.b32", *first, selector)
        high = self.op("prmt.b32", *second, selector)
        self.to(target, "prmt.b32", low, high, FIRST_TWO)
        return target

    def text(self) -> str:
        declared = ", ".join(f"r{i + 1}" for i in range(self.registers))
        return "\n".join(["{", f".reg .b32 {declared};", *self.lines, "}"])

    def shifted(self, word: str, right: int) -> str:
        if right == 0:
            return word
        return self.op("shr.u32" if right > 0 else "shl.b32", word, str(abs(right)))


def look_up(width: int, own: bool) -> LookUp:
    """The block for words of rows of `width`; of trellis codes, those of `number_lines`."""
    like = SAME_LEVELS.get(width, width)
    words = 2 if like == 3 else 1
    fields = 5 if like == 9 else 32 // (2 if like == 3 else like)
    pack = 4 if like == 9 else 2
    outputs = fields * pack // 2
    block = _Block(outputs, TABLE_WORDS[width], pack, own)
    if like == 9:
        _ternary(block)
    else:
        for half in (0, 1):
            _WRITERS[like](block, half, half * fields // 2)
    inputs = pack * TABLE_WORDS[width] + (1 if like == 9 else 2 * words)
    constraints = ",".join(["=&r"] * outputs + ["r"] * inputs)
    return LookUp(
        f"look_up_{width}", block.text(), constraints, TABLE_WORDS[width], words, fields, pack
    )


def _one_bit(block: _Block, half: int, first: int) -> None:
    """low ^ ((low ^ high) & mask), the mask a bit replicated by prmt's sign mode."""
    low, change = (
        block.op("prmt.b32", block.table(t, 0), block.table(t, 1), "0x5410") for t in (0, 1)
    )
    pair = block.op("prmt.b32", block.word(0), block.word(1), INTERLEAVE[half])
    for bit in range(8):
        moved = block.shifted(pair, bit - 7)
        for output, selector in ((first + bit, "0x9988"), (first + 8 + bit, "0xbbaa")):
            mask = block.op("prmt.b32", moved, moved, selector)
            block.to(f"${output}", "lop3.b32", change, mask, low, "0x6a")


def _two_bits(block: _Block, half: int, first: int) -> None:
    """Twice the code, and one more, are the bytes of a half in a table of four."""
    pair = block.op("prmt.b32", block.word(0), block.word(1), INTERLEAVE[half])
    for step in range(4):
        twice = block.op("and.b32", block.shifted(pair, 2 * step - 1), "0x06060606")
        selector = block.op("mad.lo.u32", twice, "0x11", "0x10101010")
        block.pick(0, 1, selector, f"${first + step}")
        block.pick(0, 1, block.shifted(selector, 16), f"${first + 4 + step}")


def _three_bits(block: _Block, half: int, first: int) -> None:
    """Low and high bytes of eight halves in two tables; codes are nibbles of two planes."""
    low, high = (
        block.op("prmt.b32", block.word(2 * p), block.word(2 * p + 1), INTERLEAVE[half])
        for p in (0, 1)
    )
    even = block.op("and.b32", block.shifted(high, -2), "0x44444444")
    odd = block.op("and.b32", high, "0x44444444")
    for parity, top in ((0, even), (1, odd)):
        bottom = block.op("and.b32", block.shifted(low, 2 * parity), "0x33333333")
        codes = block.op("or.b32", bottom, top)
        for upper in (0, 1):
            selector = block.shifted(codes, 16 * upper)
            lows, highs = block.pick(0, 1, selector), block.pick(2, 3, selector)
            field_ = first + 4 * upper + parity
            block.to(f"${field_}", "prmt.b32", lows, highs, EVEN)
            block.to(f"${field_ + 2}", "prmt.b32", lows, highs, ODD)


def _four_bits(block: _Block, half: int, first: int) -> None:
    """As three bits, with a second pair of tables; the top bit of a code chooses between them."""
    pair = block.op("prmt.b32", block.word(0), block.word(1), INTERLEAVE[half])
    codes = block.op("and.b32", pair, "0x77777777")
    top = block.op("and.b32", block.shifted(pair, 1), "0x44444444")
    either = block.op("or.b32", top, "0x32103210")
    for upper in (0, 1):
        selector, choice = block.shifted(codes, 16 * upper), block.shifted(either, 16 * upper)
        lows, highs = (
            block.op(
                "prmt.b32", block.pick(t, t + 1, selector), block.pick(t + 2, t + 3, selector),
                choice,
            )
            for t in (0, 4)
        )  # fmt: skip
        block.to(f"${first + 2 * upper}", "prmt.b32", lows, highs, EVEN)
        block.to(f"${first + 2 * upper + 1}", "prmt.b32", lows, highs, ODD)


def _ternary(block: _Block) -> None:
    """Four bytes of five digits each: 3 * byte has a digit in its upper byte and, in its lower
    one, what holds the others (`_pack_ternary` of compiler/packing.py)."""
    word = block.word(0)
    even = block.op("and.b32", word, "0x00ff00ff")
    odd = block.op("and.b32", block.shifted(word, 8), "0x00ff00ff")
    for digit in range(5):
        even, odd = (block.op("mul.lo.u32", rest, "3") for rest in (even, odd))
        digits = block.op("prmt.b32", even, odd, ODD)
        selector = block.op("mad.lo.u32", digits, "0x22", "0x10101010")
        block.pick(0, 1, selector, f"${2 * digit}")
        block.pick(0, 1, block.shifted(selector, 16), f"${2 * digit + 1}", element=2)
        if digit < 4:
            even, odd = (block.op("and.b32", rest, "0x00ff00ff") for rest in (even, odd))


_WRITERS = {1: _one_bit, 2: _two_bits, 3: _three_bits, 4: _four_bits}
