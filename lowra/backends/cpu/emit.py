"""A kernel key -> C++ source. Pure: the same key gives the same text, and nothing is run."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from importlib import resources

from lowra.backends.cpu.tiers import Tier
from lowra.compiler.packing import FORMATS

ELEMENTS = {
    "int8": (1, 1), "int16": (1, 2), "bfloat16": (2, 1), "float32": (4, 1), "values": (4, 1),
}  # fmt: skip
"""Activation types: bytes of an element in a dot product, and how many elements one value takes."""

VALUES = "values"
"""In place of a type of activations: a kernel that multiplies nothing. For products that torch
makes it unpacks values in float32, rotates activations and sums gradients by code; one that did
both would take twice as long to build."""

MIXTURES = ((1, 2, 3, 4, 9), (4, 9, 11, 12, 13))
"""Ids of widths that one kernel looks up: with plain codes of 1, 2 and 3 bits, and with trellis
codes. No weight has both, so that code for both would be built in vain."""

LOOKED_UP = tuple(sorted({id for mixture in MIXTURES for id in mixture}))
"""Ids of widths whose codebook fits a register; wider rows are multiplied in float32."""

BEFORE = ("tables", "activations", "tokens", "trellis", "rows_exact")
"""Fixed parts in their order, between the vector operations and what multiplies rows."""


@dataclass(frozen=True)
class KernelKey:
    """What a product kernel is specialised on: `widths` get code of their own."""

    tier: Tier
    activations: str
    widths: tuple[int, ...]

    @property
    def name(self) -> str:
        return f"product-{self.tier.name}-{self.activations}-{'-'.join(map(str, self.widths))}"


def key_of(tier: Tier, activations: str, widths: set[int], group_scales: bool) -> KernelKey:
    """The key that serves a weight with rows of `widths`.

    Two kernels serve all mixtures, so that few are ever built; rows that cannot be looked up, for
    their width, their scales or the tier, are multiplied in float32 in any kernel.
    """
    known = widths & set(LOOKED_UP)
    if group_scales or not tier.vectors or not known:
        return KernelKey(tier, VALUES if activations == VALUES else "float32", ())
    if len(known) == 1:
        return KernelKey(tier, activations, tuple(known))
    return KernelKey(tier, activations, max(MIXTURES, key=lambda ids: len(known & set(ids))))


def looks_up(key: KernelKey, widths: set[int]) -> bool:
    """Whether the kernel multiplies rows of all these widths in less than float32."""
    return ELEMENTS[key.activations][0] < 4 and widths <= set(_multiplied(key))


def _multiplied(key: KernelKey) -> tuple[int, ...]:
    """Widths that are multiplied as they are looked up; ternary digits fill bytes, no more."""
    return tuple(w for w in key.widths if w in UNPACKING or ELEMENTS[key.activations][0] == 1)


def emit(key: KernelKey) -> str:
    """The whole source of the product kernel of `key`."""
    element, parts = ELEMENTS[key.activations]
    most_tokens = max(1, key.tier.most_tokens // parts)
    unpacks = key.activations == VALUES
    what = "parts of W" if unpacks else "y = x W' + bias + scaling (x A') B'"
    pieces = [
        f"// {key.name}: {what}",
        _part("parallel"),
        _part("vectors"),
        "#include <utility>",
        f"constexpr int ELEMENT = {element};  // bytes per element of a dot product",
        f"constexpr int PARTS = {parts};  // elements per activation",
        f"constexpr int MOST = {key.tier.most_step};  // largest looked-up integer",
        f"constexpr int MOST_TOKENS = {most_tokens};  // that share one reading of the codes",
        _part("product/numbers"),
        _part("product/weight"),
        *(_part(f"product/{key.tier.vectors}{of}") for of in ("", "_tails") if key.widths),
        _part("product/amx") if key.tier.tiles and element == 1 else "",
        *(_part(f"product/{name}") for name in BEFORE),
        _STEPS if key.widths else "",
        *(_part(f"product/{name}") for name in (UNPACKED if unpacks else MULTIPLIED)),
        _part("product/trellis_lanes") if any(holds_trellis(id) for id in key.widths) else "",
        *(codes_of(width) for width in key.widths if width in UNPACKING),
        _part("product/ternary") if 9 in key.widths else "",
        dispatch(key),
    ]
    return "\n".join(piece for piece in pieces if piece) + "\n"


@functools.cache
def _part(name: str) -> str:
    return (resources.files("lowra.backends.cpu") / "sources" / f"{name}.h").read_text()


MULTIPLIED, UNPACKED = ("rows", "product", "blocks"), ("rows", "values", "sums")
"""Fixed parts of the kernels of either kind."""

_STEPS = """\
#define INLINE __attribute__((always_inline))
// body(0), body(1), ... with the number known to the compiler.
template <class Body, int... S>
static inline INLINE void each(const Body& body, std::integer_sequence<int, S...>) {
    (body(std::integral_constant<int, S>{}), ...);
}
template <int COUNT, class Body>
static inline INLINE void each_step(const Body& body) {
    each(body, std::make_integer_sequence<int, COUNT>{});
}"""


@dataclass(frozen=True)
class Unpacking:
    """How the codes of one width come out of a full tile of 256 columns, 16 lanes at a time."""

    load: str
    at: str


UNPACKING = {
    1: Unpacking("p0 = load_half(words[0]);", "shift_halves<2 * S, 2 * S + 1>(p0)"),
    2: Unpacking("p0 = load_words(words[0]);", "shift<2 * S>(p0)"),
    3: Unpacking(
        "p0 = load_words(words[0]); p1 = load_half(words[1]);",
        "choose(low_bits(2), shift<2 * S>(p0), rotate_halves<2 * S - 2, 2 * S - 1>(p1))",
    ),
    4: Unpacking(
        "p0 = load_words(words[0]); p1 = load_words(words[0] + 16);",
        "shift<S / 2 * 4>(S % 2 ? p1 : p0)",
    ),
    11: Unpacking(
        "number_bits(words[0], before, p0, p1);", "shift<S / 2 * 4>(S % 2 ? p1 : p0)"
    ),
    12: Unpacking(
        "number_pairs(words[0], before, p0, p1);", "shift<S / 2 * 4>(S % 2 ? p1 : p0)"
    ),
    13: Unpacking(
        "number_pairs(words[0], before, p0, p1); p2 = load_half(words[1]);",
        "add_bits(shift<S / 2 * 4>(S % 2 ? p1 : p0), 0x08080808, "
        "rotate_halves<2 * S - 3, 2 * S - 2>(p2))",
    ),
}  # fmt: skip
"""Step S covers lanes 16 S to 16 S + 15 of the tile (`arrange` in activations.h): lane i is field
i / w of word i % w, and a tile is w = 8 words per bit."""


def holds_trellis(id: int) -> bool:
    """Whether rows of this width hold trellis codes."""
    return FORMATS[id].trellis


def codes_of(width: int) -> str:
    """The struct that walks the codes of a row of `width` (an id).

    BITS are stored, PLANE of them in the first plane; what comes out names one of LEVELS, and CLEAR
    says that the top bit of its bytes is zero.
    """
    unpacking, planes = UNPACKING[width], FORMATS[width].planes
    held = [f"const uint32_t* words[{len(planes)}];"]
    words = [f"words[{i}] += {8 * bits};" for i, bits in enumerate(planes)]
    skipped = [f"words[{i}] += tiles * {8 * bits};" for i, bits in enumerate(planes)]
    opened = [f"words[0] = panel.words + row * row_words(k, {planes[0]});"]
    tail = f"gather_tail<{planes[0]}>(words[0], t.words, t.wide[s])"
    if holds_trellis(width):
        held.append("Before before;")
        opened.append("before = rows_before(panel, row, k);")
        tail = f"number_tail<{planes[0]}>(words[0], before, t, s)"
    if len(planes) == 2:
        high = "panel.words + panel.rows * row_words(k, 2) + row * row_words(k, 1)"
        opened.append(f"words[1] = {high};")
        last = "gather_tail<1>(words[1], t.narrow_words, t.narrow[s])"
        joined = f"choose(low_bits(2), {tail}, {last})"
        added = f"add_bits({tail}, 0x08080808, shift_halves_left<1, 1>({last}))"
        tail = added if holds_trellis(width) else joined
    return f"""\
struct Codes{width} {{
    static constexpr int LEVELS = {FORMATS[width].levels}, BITS = {sum(planes)};
    static constexpr int PLANE = {planes[0]}, CLEAR = {int(holds_trellis(width))};
    {" ".join(held)}
    Lanes p0{{}}, p1{{}}, p2{{}};
    void open(const Panel& panel, int64_t row, int64_t k) {{
        {" ".join(opened)}
    }}
    void skip(int64_t tiles) {{ {" ".join(skipped)} }}
    void load() {{
        {unpacking.load}
        {" ".join(words)}
    }}
    template <int S>
    Lanes at() const {{ return {unpacking.at}; }}
    Lanes tail(const Tail& t, int s) const {{
        return {tail};
    }}
}};
"""


def dispatch(key: KernelKey) -> str:
    """From a panel's width to its code; false where there is none.

    `expand_of_width` without memory only tells whether there is."""
    if key.activations == VALUES:
        values = _switch(key.widths, "values_of<Codes{}>(w, panel, row, part, at)")
        return f"""\
#define ANY [[maybe_unused]]
static bool values_of_width(ANY const Weight& w, ANY const Panel& panel, ANY int64_t row,
                            ANY const Part& part, ANY int64_t at) {{
{values}    return false;
}}"""
    multiplied = _multiplied(key)
    products = _switch(multiplied, "rows_of<Codes{}>(w, c, t, panel, begin, end)")
    expanded = _switch(multiplied, "if (out) expand_row<Codes{}>(w, panel, row, out)")
    return f"""\
#define ANY [[maybe_unused]]
static bool rows_of_width(ANY const Weight& w, ANY const Call& c, ANY const Tokens& t,
                          ANY const Panel& panel, ANY int64_t begin, ANY int64_t end) {{
{products}    return false;
}}
[[maybe_unused]] static bool expand_of_width(ANY const Weight& w, ANY const Panel& panel,
                                             ANY int64_t row, ANY uint8_t* out) {{
{expanded}    return false;
}}"""


TERNARY_CODE = (
    ("rows_of<Codes9>", "ternary_rows"),
    ("expand_row<Codes9>", "expand_ternary"),
    ("values_of<Codes9>", "ternary_values"),
)


def _switch(widths: tuple[int, ...], call: str) -> str:
    if not widths:
        return ""
    cases = "".join(f"        case {w}: {call.format(w)}; return true;\n" for w in widths)
    for looked_up, own in TERNARY_CODE:
        cases = cases.replace(looked_up, own)
    return f"    switch (panel.width) {{\n{cases}    }}\n"
