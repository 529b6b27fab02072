"""Options of `compile` and `plan` for the fields of a recipe that few need, in their own panel.

Both commands list them, so that --help shows them; their values are read from the context.
"""

from __future__ import annotations

from typing import Annotated, Any

import typer

PANEL = "Advanced"

LayoutsOption = Annotated[
    str | None,
    typer.Option(
        metavar="auto|LIST", rich_help_panel=PANEL,
        help="Layouts to choose from per site, such as row8-shared16,64x4-shared16; "
        "auto: a short list.",
    ),
]  # fmt: skip
GroupOption = Annotated[
    int | None,
    typer.Option(help="Columns per scale; -1 one per row, 0 none.", rich_help_panel=PANEL),
]
ScaleBitsOption = Annotated[
    int | None, typer.Option(help="Bits per scale: 16, 8 or 4.", rich_help_panel=PANEL)
]
CodebookBitsOption = Annotated[
    int | None, typer.Option(help="Bits per codebook value: 16 or 8.", rich_help_panel=PANEL)
]
SharedCodebooksOption = Annotated[
    bool | None,
    typer.Option(
        "--shared-codebooks/--own-codebooks",
        help="Codebooks shared by the rows of a site, or one per row.",
        rich_help_panel=PANEL,
    ),
]
TrellisOption = Annotated[
    bool | None,
    typer.Option(
        "--trellis/--plain-codes",
        help="Narrow rows hold trellis codes, or a level per weight.",
        rich_help_panel=PANEL,
    ),
]
RotationOption = Annotated[
    bool | None,
    typer.Option(
        "--rotation/--no-rotation",
        help="Rotate every input, or none; by default where it pays.",
        rich_help_panel=PANEL,
    ),
]
GuidedOption = Annotated[
    int | None,
    typer.Option(
        help="Groups of rows with a metric of their own: 1, 2 or 4.", rich_help_panel=PANEL
    ),
]
InitOption = Annotated[
    str | None,
    typer.Option(
        metavar="HOW", rich_help_panel=PANEL,
        help="How the adapter starts: closed-form, two-sided, alternate, loftq or zero.",
    ),
]  # fmt: skip
CorrectionRankOption = Annotated[
    int | None,
    typer.Option(help="Rank of a frozen correction, within the budget.", rich_help_panel=PANEL),
]
CorrectionBitsOption = Annotated[
    int | None, typer.Option(help="Bits per value of it: 4 or 8.", rich_help_panel=PANEL)
]
AlphaOption = Annotated[
    float | None, typer.Option(help="LoRA's alpha; by default the rank.", rich_help_panel=PANEL)
]
TargetsOption = Annotated[
    list[str] | None,
    typer.Option(
        "--target", metavar="PATTERN", rich_help_panel=PANEL,
        help="Weights that get an adapter, by default all; repeatable.",
    ),
]  # fmt: skip
RankPatternOption = Annotated[
    list[str] | None,
    typer.Option(
        "--rank-pattern", metavar="PATTERN=RANK", rich_help_panel=PANEL,
        help="Another LoRA rank for some weights; repeatable.",
    ),
]  # fmt: skip
RsloraOption = Annotated[
    bool | None,
    typer.Option("--rslora", help="Scale by alpha / sqrt(rank).", rich_help_panel=PANEL),
]
LoraDropoutOption = Annotated[
    float | None,
    typer.Option(help="Share of an adapter's inputs that training drops.", rich_help_panel=PANEL),
]
TrainOption = Annotated[
    str | None,
    typer.Option(
        metavar="adapters,norms,codebooks,scales", rich_help_panel=PANEL,
        help="What fine-tuning trains, parted by commas. [adapters]",
    ),
]  # fmt: skip

ADVANCED = (
    "layouts", "group", "scale_bits", "codebook_bits", "shared_codebooks", "trellis", "rotation",
    "guided",
    "init", "correction_rank", "correction_bits", "alpha", "targets", "rank_pattern", "rslora",
    "lora_dropout", "train",
)  # fmt: skip
"""Names of these options, which are those of the recipe's fields."""


def advanced_fields(ctx: typer.Context) -> dict[str, Any]:
    """The recipe's fields that these options give; None where one was not given."""
    from lowra.passes.budget.adapter_ranks import parse_ranks

    fields = {name: ctx.params[name] for name in ADVANCED}
    for name in ("layouts", "train"):
        if fields[name] not in (None, "auto"):
            fields[name] = parted(fields[name])
    fields["targets"] = tuple(fields["targets"] or ()) or None
    fields["rank_pattern"] = dict(parse_ranks(fields["rank_pattern"] or ())) or None
    return fields


def parted(text: str) -> tuple[str, ...]:
    """What commas part."""
    return tuple(part.strip() for part in text.split(","))
