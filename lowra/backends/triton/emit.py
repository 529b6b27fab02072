"""A kernel key -> Triton source. Pure: the same key gives the same text, and nothing is run."""

from __future__ import annotations

from lowra.backends.triton.emit_adapters import PAGES, READ, expand_body, gather_body
from lowra.backends.triton.emit_inputs import rotate_body, shrink_body
from lowra.backends.triton.emit_integer import integer_body
from lowra.backends.triton.emit_levels import quantize_body
from lowra.backends.triton.emit_linear import linear_body, linear_reading
from lowra.backends.triton.emit_rounding import rounding_body
from lowra.backends.triton.emit_values import values_body, values_reading
from lowra.backends.triton.integer_codes import integer_functions
from lowra.backends.triton.keys import (
    TERNARY_ID,
    ExpandKey,
    GatherKey,
    IntegerKey,
    Key,
    LinearKey,
    QuantizeKey,
    RotateKey,
    RoundKey,
    ShrinkKey,
    ValuesKey,
    WeightKey,
)
from lowra.backends.triton.tables import HELD, SETTLED, look_up_source
from lowra.backends.triton.tiles import indented

HEADER = "import triton\nimport triton.language as tl\n"


def emit(key: Key) -> str:
    """The source of the kernel of `key`: a Python module that holds one kernel, `kernel`."""
    parts = [f"# {key.name}\n{HEADER}"]
    if isinstance(key, LinearKey):
        reading = linear_reading(key)
        parts += [
            look_up_source(panel.width, key.weight.own, key.dtype)
            for panel in key.weight.panels if reading.permutes(panel.width)
        ]  # fmt: skip
        parts += [HELD.strip()] if len(parts) > 1 else []
    if isinstance(key, ValuesKey):
        parts += [
            look_up_source(panel.width, key.weight.own, "float16")
            for panel in key.weight.panels if not values_reading(key, panel.width).exact
        ]  # fmt: skip
        parts += [HELD.strip()] if len(parts) > 1 else []
    if isinstance(key, IntegerKey):
        parts += integer_functions(key)
    if isinstance(key, LinearKey | ShrinkKey) and key.target.multiplies_behind:
        parts.append(SETTLED.strip())
    if isinstance(key, GatherKey | ExpandKey):
        parts.append(READ.strip())
    signature = "\n".join(f"    {name}," for name in arguments(key))
    parts.append(
        "@triton.jit\ndef kernel(\n" + signature + "\n):\n" + "\n".join(indented(_body(key)))
    )
    return "\n\n".join(parts) + "\n"


def _body(key: Key) -> list[str]:
    match key:
        case LinearKey():
            return linear_body(key)
        case IntegerKey():
            return integer_body(key)
        case QuantizeKey():
            return quantize_body(key)
        case ValuesKey():
            return values_body(key)
        case ShrinkKey():
            return shrink_body(key)
        case RotateKey():
            return rotate_body(key)
        case GatherKey():
            return gather_body(key)
        case ExpandKey():
            return expand_body(key)
        case RoundKey():
            return rounding_body(key)


def arguments(key: Key) -> list[str]:
    """Names of a kernel's arguments: tensors, then numbers."""
    if isinstance(key, ValuesKey):
        return [*_packed(key.weight), "out", "n", "k", "first_column", "last_column"]
    if isinstance(key, RotateKey):
        return ["x", "signs", "out", "k"]
    if isinstance(key, QuantizeKey):
        return ["x", "level_bytes", "steps", "sums", "k", "line"]
    if isinstance(key, ShrinkKey):
        return ["x", "lora_a", "partial", "counters", "hidden", "m", "k", "rank"]
    if isinstance(key, GatherKey):
        return ["x", *PAGES, "slots", "hidden", "m", "k", "places", "rank"]
    if isinstance(key, ExpandKey):
        given = ["scalings", "slots", "weights", "hidden"]
        return ["y", "out", *PAGES, *given, "m", "n", "place", "places", "rank", "parts"]
    if isinstance(key, RoundKey):
        values = ["values"] if key.descends else []
        scales = ["scales", "columns"] if key.scaled else []
        out = ["codes", "changes"]
        return ["given", *values, "matrix", "tables", *scales, *out, "first", "n", "k", "levels"]
    tensors = [
        *(["bias"] if key.bias else []), *(["hidden", "lora_b"] if key.rank else []),
        *(["partial", "counters"] if key.split else []),
    ]  # fmt: skip
    numbers = ["m", "n", "k", *(["rank", "scaling"] if key.rank else [])]
    if isinstance(key, IntegerKey):
        packed = _packed(key.weight, by_words=True)
        return ["level_words", "steps", "sums", *packed, *tensors, "y", *numbers, "line"]
    return ["x", *_packed(key.weight), *tensors, "y", *numbers]


def _packed(weight: WeightKey, by_words: bool = False) -> list[str]:
    ternary = [panel.width == TERNARY_ID and not by_words for panel in weight.panels]
    return [
        *([] if all(ternary) else ["codes"]), *(["code_bytes"] if any(ternary) else []), "books",
        *(["scales"] if weight.group else []), *(["order"] if weight.permuted else []), "tiles",
    ]  # fmt: skip
