"""lowra finetune: train the adapters of a compressed model on data, and write it with them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lowra.cli.options import JsonOption, OverwriteOption, VerboseOption
from lowra.cli.sources import load_source, require_tokenizer
from lowra.cli.tables import print_facts, print_table

if TYPE_CHECKING:
    from rich.console import Console

FIELDS = (
    "text_field", "split", "context", "long", "eval_share", "epochs", "max_steps", "batch",
    "accumulation", "optimizer", "rate", "schedule", "warmup", "weight_decay", "clip",
    "eval_every", "patience", "keep", "checkpointing", "autocast", "seed",
)  # fmt: skip
"""Options that are fields of TrainingSettings, whose defaults hold where one is not given."""


def finetune_model(
    ctx: typer.Context,
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A compressed model's folder.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The checkpoint folder to write.")],
    data: Annotated[
        str,
        typer.Option(
            metavar="DATA",
            help="A .jsonl, .csv, .parquet or text file, or a Hub data set, owner/name[:config].",
        ),
    ],
    text_field: Annotated[
        str | None,
        typer.Option(help="The field of the text or the messages; by default messages or text."),
    ] = None,
    split: Annotated[str | None, typer.Option(help="Part of a Hub data set. [train]")] = None,
    eval_data: Annotated[
        str | None, typer.Option(metavar="DATA", help="Held-out data; by default a share of DATA.")
    ] = None,
    eval_share: Annotated[float | None, typer.Option(help="Share held out. [0.1]")] = None,
    epochs: Annotated[float | None, typer.Option(help="Times through the data. [1]")] = None,
    max_steps: Annotated[int | None, typer.Option(help="Steps, in place of epochs.")] = None,
    batch: Annotated[int | None, typer.Option(help="Rows of a forward. [4]")] = None,
    accumulation: Annotated[int | None, typer.Option(help="Forwards of a step. [1]")] = None,
    context: Annotated[int | None, typer.Option(help="Most tokens of a row. [512]")] = None,
    long: Annotated[
        str | None,
        typer.Option(metavar="pack|truncate", help="Join and cut examples, or cut each. [pack]"),
    ] = None,
    optimizer: Annotated[
        str | None,
        typer.Option(
            metavar="adamw|lora-rite|oplora",
            help="AdamW, or one that sees A and B as one product. [adamw]",
        ),
    ] = None,
    rate: Annotated[
        float | None,
        typer.Option(
            help="Learning rate; with lora-rite and oplora, of A and B alone. "
            "[0.0002; lora-rite 0.001, oplora 1]"
        ),
    ] = None,
    schedule: Annotated[
        str | None,
        typer.Option(
            metavar="cosine|linear|constant_with_warmup",
            help="The rate after the warm-up. [cosine]",
        ),
    ] = None,
    warmup: Annotated[float | None, typer.Option(help="Share of the steps. [0.03]")] = None,
    weight_decay: Annotated[float | None, typer.Option(help="Of A and B. [0]")] = None,
    clip: Annotated[float | None, typer.Option(help="Norm of the gradient; 0 none. [1]")] = None,
    eval_every: Annotated[
        int | None, typer.Option(help="Steps between evaluations and checkpoints. [a tenth]")
    ] = None,
    patience: Annotated[
        int | None, typer.Option(help="Stop after so many evaluations without a better loss.")
    ] = None,
    keep: Annotated[int | None, typer.Option(help="Checkpoints kept beside the best. [2]")] = None,
    train: Annotated[
        str | None,
        typer.Option(
            metavar="adapters,norms,codebooks,scales",
            help="What trains, parted by commas. [as compiled]",
        ),
    ] = None,
    checkpointing: Annotated[
        bool | None, typer.Option("--checkpointing", help="Recompute activations: less memory.")
    ] = None,
    autocast: Annotated[
        bool | None, typer.Option("--autocast", help="Compute a float32 model in bfloat16.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of order, held-out part, dropout. [0]")] = None,
    work_dir: Annotated[
        Path | None, typer.Option(help="Checkpoints and report; by default OUT.training.")
    ] = None,
    restart: Annotated[
        bool, typer.Option("--restart", help="Throw the work folder's run away, begin anew.")
    ] = False,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Train the adapters of MODEL on DATA and write OUT, with a report and a loss curve.

    Interrupted, the same command goes on at the last checkpoint.
    """
    from lowra.cli.advanced import parted
    from lowra.cli.compile import check_output
    from lowra.compiler.progress import show_progress
    from lowra.workflows.training_settings import TrainingSettings

    given = {name: ctx.params[name] for name in FIELDS if ctx.params[name] is not None}
    if train is not None:
        given["train"] = parted(train)
    settings = TrainingSettings.from_dict(given)
    check_output(out, overwrite)
    whole = out.expanduser().absolute()
    folder = work_dir or whole.with_name(f"{whole.name}.training")
    with show_progress():
        report = _finetune(ctx, model, out, data, eval_data, folder, settings, restart)
    document = {"model": model, "path": str(out), "work_dir": str(folder), **report}
    ctx.obj.show(document, lambda console: _render(console, document))


def _finetune(
    ctx: typer.Context, source: str, out: Path, data: str, eval_data: str | None, folder: Path,
    settings: Any, restart: bool,
) -> dict[str, Any]:  # fmt: skip
    import lowra.api
    from lowra.compiler.errors import CheckpointError
    from lowra.compiler.progress import stage
    from lowra.runtime.compiled import compiled
    from lowra.workflows.finetune import finetune
    from lowra.workflows.training_data import describe_cut

    model, tokenizer = load_source(source)
    if compiled(model) is None:
        raise CheckpointError(
            f"{source!r} is not compressed: run lowra compile {source} FOLDER --bits 2 first"
        )
    tokenizer = require_tokenizer(tokenizer, source)
    ctx.obj.resumable = True
    done = finetune(
        model, data, folder, tokenizer=tokenizer, settings=settings, eval_data=eval_data,
        restart=restart, tell=lambda entry: _tell(ctx, entry),
    )  # fmt: skip
    with stage(f"save {out}", None):
        lowra.api.save(model, out, tokenizer=tokenizer, overwrite=True)
    ctx.obj.note(describe_cut(done.report["data"]))
    return done.report


def _tell(ctx: typer.Context, entry: dict[str, Any]) -> None:
    """A line per log entry, for logs and terminals alike."""
    step = entry["step"]
    if "eval_loss" in entry:
        ctx.obj.note(f"step {step}: held-out loss {entry['eval_loss']:.4f}")
    elif "loss" in entry:
        ctx.obj.note(
            f"step {step}: loss {entry['loss']:.4f}, {entry['tokens_per_second']:,.0f} tokens/s, "
            f"peak memory {entry['peak_bytes'] / 1e9:.2f} GB"
        )


def _render(console: Console, data: dict[str, Any]) -> None:
    rows = [
        (str(e["step"]), f"{e['loss']:.4f}", "inf" if p is None else f"{p:.3f}")
        for e in data["evaluations"]
        for p in [e["perplexity"]]
    ]
    if rows:
        print_table(console, "held-out data", ("step>", "loss>", "perplexity>"), rows)
    trained = data["trainable"]
    facts = {
        "steps": f"{data['steps']}" + (", stopped early" if data["stopped_early"] else ""),
        "trained": f"{trained['trained']:,} of {trained['total']:,} parameters",
        "data": f"{data['data']['rows']} rows, {data['data']['tokens']:,} tokens",
        "peak memory": f"{data['peak_bytes'] / 1e9:.2f} GB",
        "seconds": f"{data['seconds']:.1f}",
    }
    if data["best"] is not None:
        facts["best step"] = f"{data['best']['step']}, and as it was there the model is written"
    print_facts(console, facts)
    console.print(f"wrote {data['path']}; report.json and loss.svg are in {data['work_dir']}",
                  soft_wrap=True)  # fmt: skip
