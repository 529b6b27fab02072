"""Kernel keys: all that generated source depends on, and nothing else."""

from __future__ import annotations

from dataclasses import dataclass

from lowra.backends.triton.targets import Target
from lowra.compiler.packing import FORMATS, TERNARY_TILE, TILE

DTYPES = ("bfloat16", "float16", "float32")
TERNARY_ID = 9


@dataclass(frozen=True)
class Blocks:
    """What one program of a launch computes, and with what: rows of W, tokens, warps, and stages
    of loads in flight."""

    rows: int
    tokens: int
    warps: int
    stages: int


ONE_ROW = Blocks(1, 1, 4, 1)
"""Of what is done to the inputs of one token."""


@dataclass(frozen=True)
class PanelKey:
    """Rows of one width id. aligned: words that every row begins at a multiple of: 4, 2 or 1."""

    width: int
    aligned: int

    @property
    def text(self) -> str:
        format_ = FORMATS[self.width]
        name = f"t{format_.width}" if format_.trellis else f"{self.width}"
        return name + ("" if self.aligned == 4 else "abc"[self.aligned])


@dataclass(frozen=True)
class WeightKey:
    """How a packed weight lies in memory.

    own: a codebook per row. group: columns per scale, -1 one per row, 0 none. tail, ternary_tail:
    the last tile of a row is shorter. permuted: rows are stored in another order than given.
    """

    panels: tuple[PanelKey, ...]
    own: bool
    group: int
    tail: bool
    ternary_tail: bool
    permuted: bool

    @property
    def text(self) -> str:
        widths = "".join(panel.text for panel in self.panels)
        scales = {0: "none", -1: "row"}.get(self.group, str(self.group))
        flags = [
            name for name, on in (
                ("own", self.own), ("tail", self.tail), ("ternarytail", self.ternary_tail),
                ("permuted", self.permuted),
            ) if on
        ]  # fmt: skip
        return "-".join([f"w{widths}", scales, *flags])


@dataclass(frozen=True)
class ProductKey:
    """y = x W' + bias + scaling h B'.

    dtype: of y. rank: of the factors, rounded up to what a product takes; 0 without. split: a few
    programs share the columns of a tile and the last one adds up. waits: it starts while the kernel
    ahead of it, which makes some of what it reads, may still run (programmatic dependent launch).
    factor_dtype: of B, where it is another than `dtype`.
    """

    target: Target
    weight: WeightKey
    dtype: str
    blocks: Blocks
    rank: int = 0
    bias: bool = False
    split: bool = False
    waits: bool = False
    factor_dtype: str = ""

    def named(self, what: str) -> str:
        """The name of a kernel of this kind."""
        b = self.blocks
        extra = [
            *([f"r{self.rank}{self.factor_dtype}"] if self.rank else []),
            *(word for word in ("bias", "split", "waits") if getattr(self, word)),
        ]
        sizes = f"{b.rows}x{b.tokens}w{b.warps}s{b.stages}"
        return "-".join([what, self.target.name, self.dtype, self.weight.text, *extra, sizes])


@dataclass(frozen=True)
class LinearKey(ProductKey):
    """x and the products are of `dtype`, too. With factors, only h may still be in the making."""

    @property
    def name(self) -> str:
        return self.named("linear")


@dataclass(frozen=True)
class IntegerKey(ProductKey):
    """For a few tokens whose x are integers, as `QuantizeKey` leaves them; see emit_integer.py.

    fine: a second integer per value of x and of the codebooks, for 15 bits in all.
    """

    fine: bool = False

    @property
    def name(self) -> str:
        return self.named("int16" if self.fine else "int8")


@dataclass(frozen=True)
class QuantizeKey:
    """x as integers and a step per 1280 columns, once in each of `orders`; see emit_levels.py.

    orders: width ids, each naming the order in which the words of such rows meet x. fine: see
    IntegerKey. signals: see ShrinkKey.
    """

    target: Target
    dtype: str
    orders: tuple[int, ...]
    fine: bool
    signals: bool = False
    blocks: Blocks = ONE_ROW

    @property
    def name(self) -> str:
        what = "quantize16" if self.fine else "quantize8"
        signals = ["signals"] if self.signals else []
        orders = "o" + "".join(map(str, self.orders))
        return "-".join([what, self.target.name, self.dtype, orders, *signals])


@dataclass(frozen=True)
class ValuesKey:
    """The values of W, a tile of columns per program, to a dense matrix of `dtype`."""

    target: Target
    weight: WeightKey
    dtype: str
    blocks: Blocks

    @property
    def name(self) -> str:
        b = self.blocks
        sizes = f"{b.rows}w{b.warps}"
        return "-".join(["values", self.target.name, self.dtype, self.weight.text, sizes])


@dataclass(frozen=True)
class ShrinkKey:
    """h = x A' for A of up to `blocks.rows` rows in `factor_dtype`; sums of parts as LinearKey's.

    signals: it starts before the kernel ahead of it has ended, and the one behind it likewise.
    """

    target: Target
    dtype: str
    factor_dtype: str
    blocks: Blocks
    signals: bool = False

    @property
    def name(self) -> str:
        b = self.blocks
        signals = ["signals"] if self.signals else []
        sizes = f"{b.rows}x{b.tokens}w{b.warps}s{b.stages}"
        dtypes = [self.dtype, self.factor_dtype]
        return "-".join(["shrink", self.target.name, *dtypes, *signals, sizes])


@dataclass(frozen=True)
class RotateKey:
    """x turned by signs, then Hadamard blocks; or `back`, in the other order.

    signals: see ShrinkKey.
    """

    target: Target
    dtype: str
    block: int
    back: bool
    signals: bool = False
    blocks: Blocks = ONE_ROW

    @property
    def name(self) -> str:
        way = "back" if self.back else "rotate"
        signals = ["signals"] if self.signals else []
        sizes = f"{self.block}w{self.blocks.warps}"
        return "-".join([way, self.target.name, self.dtype, *signals, sizes])


@dataclass(frozen=True)
class GatherKey:
    """h = A x of adapters in pages, by token and place; see emit_adapters.py."""

    target: Target
    dtype: str
    blocks: Blocks

    @property
    def name(self) -> str:
        return _of_adapters("gather", self.target, self.dtype, self.blocks)


@dataclass(frozen=True)
class ExpandKey:
    """y changed by what follows h, for the adapters of one place; `out` is of `out_dtype`."""

    target: Target
    dtype: str
    out_dtype: str
    blocks: Blocks

    @property
    def name(self) -> str:
        return _of_adapters(f"expand-{self.out_dtype}", self.target, self.dtype, self.blocks)


@dataclass(frozen=True)
class RoundKey:
    """Codes of a panel of columns, for error feedback or, where it `descends`, coordinate descent;
    see emit_rounding.py. levels: of a row's table, rounded up to a power of two."""

    target: Target
    descends: bool
    scaled: bool
    levels: int
    blocks: Blocks

    @property
    def name(self) -> str:
        what = "descend" if self.descends else "feedback"
        scaled = ["scaled"] if self.scaled else []
        sizes = f"{self.blocks.rows}w{self.blocks.warps}"
        return "-".join([what, self.target.name, f"l{self.levels}", *scaled, sizes])


def _of_adapters(what: str, target: Target, dtype: str, blocks: Blocks) -> str:
    return f"{what}-{target.name}-{dtype}-{blocks.tokens}w{blocks.warps}s{blocks.stages}"


Key = (
    LinearKey | IntegerKey | QuantizeKey | ValuesKey | ShrinkKey | RotateKey | GatherKey
    | ExpandKey | RoundKey
)  # fmt: skip


def weight_key(panels: list[int], k: int, group: int, own: bool, permuted: bool) -> WeightKey:
    """The key of a packed weight, from the arguments of every `lowra::` op."""
    keys, word = [], 0
    for id, rows in zip(panels[0::2], panels[1::2], strict=True):
        planes = FORMATS[id].planes
        aligned = 4
        for per_row in _plane_words(id, k) if planes else [-(-k // 20)]:
            while word % aligned or per_row % aligned:
                aligned //= 2
            word += rows * per_row
        keys.append(PanelKey(id, aligned))
    ids = {panel.width for panel in keys}
    tail = bool(k % TILE) and bool(ids - {TERNARY_ID})
    ternary_tail = bool(k % TERNARY_TILE) and TERNARY_ID in ids
    return WeightKey(tuple(keys), own, max(group, -1), tail, ternary_tail, permuted)


def _plane_words(id: int, k: int) -> list[int]:
    return [-(-k // 32) * bits for bits in FORMATS[id].planes]
