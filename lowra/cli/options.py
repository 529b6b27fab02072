"""Arguments and options that several commands share, and the recipe they make."""

from __future__ import annotations

from contextlib import AbstractContextManager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from lowra.recipe import Recipe


class Preset(StrEnum):
    """Presets of a recipe."""

    default = "default"
    lowra = "lowra"


class Unit(StrEnum):
    """What shares one width."""

    row = "row"
    layer = "layer"
    siblings = "siblings"


class Tune(StrEnum):
    """How much is tuned after quantizing."""

    none = "none"
    blocks = "blocks"
    full = "full"


class Dtype(StrEnum):
    """In what a dense model is loaded."""

    bfloat16 = "bfloat16"
    float32 = "float32"
    float16 = "float16"


class Activations(StrEnum):
    """In what type products on packed weights read activations."""

    int16 = "int16"
    int8 = "int8"
    bfloat16 = "bfloat16"
    float32 = "float32"


ModelArgument = Annotated[
    str, typer.Argument(metavar="MODEL", help="A Hub id, a folder, or a .gguf file.")
]
BitsOption = Annotated[
    float, typer.Option("--bits", help="Bits per compressed weight, a hard cap.")
]
OptionalBitsOption = Annotated[
    float | None,
    typer.Option("--bits", help="Bits per compressed weight, a hard cap; needed without --plan."),
]
PresetOption = Annotated[
    Preset, typer.Option(help="'default', or 'lowra': the paper to the letter, data-free.")
]
RankOption = Annotated[
    str | None,
    typer.Option(
        metavar="N|auto",
        help="LoRA rank, 0 for no adapter, auto: per site, within the budget; default 16.",
    ),
]
WidthsOption = Annotated[
    str | None,
    typer.Option(metavar="1,1.6,2,3,4", help="Candidate widths; by default chosen by the budget."),
]
UnitOption = Annotated[
    Unit, typer.Option(help="A width per output row, per layer, or for all layers on one input.")
]
PinOption = Annotated[
    list[str] | None,
    typer.Option("--pin", metavar="PATTERN=WIDTH", help="Fix the width of sites; repeatable."),
]
IncludeOption = Annotated[
    list[str] | None,
    typer.Option(metavar="PATTERN", help="Compress weights skipped by default; repeatable."),
]
IgnoreOption = Annotated[
    list[str] | None, typer.Option(metavar="PATTERN", help="Leave weights alone; repeatable.")
]
CountAdaptersOption = Annotated[
    bool, typer.Option("--count-adapters", help="Count LoRA factors towards the budget.")
]
TuneOption = Annotated[
    Tune,
    typer.Option(
        help="'blocks': learned rounding, layer by layer. 'full': and then codebooks, scales, "
        "norms and adapter end to end. Minutes instead of seconds, and better below 3 bits."
    ),
]
TuneStepsOption = Annotated[
    int | None, typer.Option(help="Steps per block; by default as Recipe says.")
]
DtypeOption = Annotated[Dtype, typer.Option(help="What a dense model is loaded in.")]
ActivationsOption = Annotated[
    Activations | None,
    typer.Option(
        help="What products on packed weights read halves as; int8 is faster and loses a little. "
        "On a GPU it counts for a few tokens. [int16 on a CPU, as they are on a GPU]"
    ),
]
DeviceOption = Annotated[
    str | None,
    typer.Option(metavar="DEVICE", help="Where to run: cpu, cuda, cuda:1. [a GPU if there is one]"),
]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Replace an earlier result.")]
# The group reads these two before it parses anything; see lowra.cli.errors.
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document to stdout.")]
VerboseOption = Annotated[
    bool, typer.Option("--verbose", "-v", help="Log more; show notes and tracebacks of errors.")
]


def make_recipe(
    *, pin: list[str] | None, widths: str | None, preset: Preset, unit: Unit,
    rank: str | None, **fields: Any,
) -> Recipe:  # fmt: skip
    """The recipe of the options; one that was not given (None) keeps the recipe's default.

    Raises RecipeError, BudgetError, and typer.BadParameter for what cannot be parsed.
    """
    from lowra.recipe import Recipe

    fields |= {"pins": parse_pins(pin or []), "preset": preset.value, "unit": unit.value}
    if rank is not None:
        fields["rank"] = parse_rank(rank)
    if widths is not None:
        fields["widths"] = parse_widths(widths)
    return Recipe.from_dict({name: v for name, v in fields.items() if v is not None})


def refuse_options(ctx: typer.Context, names: tuple[str, ...], beside: str) -> None:
    """Raise a usage error where any of the options `names` was given on the command line."""
    for name in names:
        source = ctx.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            option = f"--{name.replace('_', '-')}"
            raise typer.BadParameter(f"it cannot stand beside {beside}", param_hint=f"'{option}'")


def parse_rank(rank: str) -> int | str:
    """`"16"` as `16`, and `"auto"` as it is."""
    if rank != "auto" and not rank.strip().isdecimal():
        raise typer.BadParameter(f"{rank!r} is no rank; give 16, or auto", param_hint="'--rank'")
    return rank if rank == "auto" else int(rank)


def parse_pins(pins: list[str]) -> dict[str, float]:
    """`["*.q_proj=4"]` as `{"*.q_proj": 4}`."""
    parsed: dict[str, float] = {}
    for pin in pins:
        pattern, _, text = pin.rpartition("=")
        width = _width(text)
        if not pattern or width is None:
            raise typer.BadParameter(f"{pin!r} is not PATTERN=WIDTH", param_hint="'--pin'")
        parsed[pattern] = width
    return parsed


def parse_widths(widths: str) -> tuple[float, ...]:
    """`"1,1.6,2"` as `(1, 1.6, 2)`."""
    parts = [width for part in widths.split(",") if (width := _width(part)) is not None]
    if len(parts) != widths.count(",") + 1:
        raise typer.BadParameter(
            f"{widths!r} is not a list of widths such as 1,2,4", param_hint="'--widths'"
        )
    return tuple(parts)


def _width(text: str) -> float | None:
    """`"4"` as 4, `"1.6"` as 1.6, and None for what is no plain decimal number."""
    text = text.strip()
    if text.isdecimal():
        return int(text)
    whole, point, part = text.partition(".")
    return float(text) if point and whole.isdecimal() and part.isdecimal() else None


def reading(activations: Activations | None) -> AbstractContextManager[None]:
    """Products read activations as the option says for as long as the block runs."""
    from lowra.backends import activations as backends

    return backends.activations(None if activations is None else activations.value)


def read_text(path: Path) -> str:
    """The text of a UTF-8 file. Raises CalibrationError when it cannot be read."""
    from lowra.compiler.errors import CalibrationError

    try:
        return path.expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CalibrationError(
            f"cannot read the text file {str(path)!r} ({error}): give a UTF-8 text file"
        ) from error
