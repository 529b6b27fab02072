"""lowra adapter: what can be done with a LoRA adapter."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lowra.cli.adapter_compress import compress_adapter, convert_adapter, inspect_adapter
from lowra.cli.adapter_diff import diff_adapter
from lowra.cli.calibration_options import CalibrationOption
from lowra.cli.options import JsonOption, VerboseOption, read_text
from lowra.cli.sources import load_source, require_tokenizer
from lowra.cli.tables import print_facts

if TYPE_CHECKING:
    from rich.console import Console
    from torch import nn

NOT_TOLD = 9
"""Exit code of a merge that was measured and not written: AdapterError's."""

adapter_app = typer.Typer(no_args_is_help=True, help="Compress, compare and merge LoRA adapters.")


@adapter_app.callback()
def adapter_root() -> None:
    """Work on LoRA adapters: compress, look at, compare and merge them."""


adapter_app.command("compress")(compress_adapter)
adapter_app.command("inspect")(inspect_adapter)
adapter_app.command("diff")(diff_adapter)
adapter_app.command("convert")(convert_adapter)


@adapter_app.command("merge")
def merge(
    ctx: typer.Context,
    base: Annotated[str, typer.Argument(metavar="BASE", help="A compiled model's folder.")],
    adapter: Annotated[str, typer.Argument(metavar="ADAPTER", help="A folder, or a Hub id.")],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="The folder to write.")],
    yes: Annotated[bool, typer.Option("--yes", help="Write, whatever it costs.")] = False,
    dense: Annotated[
        bool, typer.Option("--dense", help="Write dense weights instead of compiling them again.")
    ] = False,
    on_top: Annotated[
        bool, typer.Option("--on-top", help="Keep BASE's own adapter, and merge the sum of both.")
    ] = False,
    any_base: Annotated[
        bool, typer.Option("--any-base", help="Take an adapter that was made for another base.")
    ] = False,
    text: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Text to measure on; by default Python's reference."),
    ] = None,
    windows: Annotated[int, typer.Option(min=1, help="How many windows of text.")] = 8,
    context: Annotated[int, typer.Option(min=2, help="Tokens per window.")] = 256,
    calibration: CalibrationOption = None,
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Merge ADAPTER into the weights of BASE, and say what that costs before writing anything.

    Merged weights do not lie on BASE's codebooks: they are compiled anew with its recipe, which
    loses again what quantizing loses. Without --yes the cost is measured, and nothing is written.
    """
    import lowra.api
    from lowra.compiler.progress import show_progress, stage
    from lowra.runtime.checkpoint_writer import check_free
    from lowra.workflows.evaluate import held_out_english
    from lowra.workflows.evaluate import windows as cut
    from lowra.workflows.merge_cost import merge_cost

    check_free(out)
    words = held_out_english() if text is None else read_text(text)
    with show_progress():
        model, tokenizer = load_source(base)
        tokens = cut(words, require_tokenizer(tokenizer, base), count=windows, context=context)
        lowra.api.load_adapter(model, adapter, on_top=on_top, check_base=not any_base)
        merged = lowra.api.merge_adapter(
            model, dense=dense, calibration=calibration, tokenizer=tokenizer
        )
        cost = merge_cost(model, merged, tokens)
    data: dict[str, Any] = {
        "base": base, "adapter": adapter, "path": str(out), "dense": dense, **cost.to_dict(),
    }  # fmt: skip
    told = yes or _ask(data, as_json)
    if told:
        with stage(f"save {out}", None):
            _write(merged, out, tokenizer, dense)
    data["written"] = told
    ctx.obj.show(data, lambda console: _render(console, data))
    if not told:
        ctx.obj.note(f"nothing was written: {_cost_text(data)}; add --yes to write {out}")
        raise typer.Exit(NOT_TOLD)


def _ask(data: dict[str, Any], as_json: bool) -> bool:
    """Ask whoever watches; nobody there is a no."""
    if as_json or not (sys.stdin.isatty() and sys.stderr.isatty()):
        return False
    return typer.confirm(f"{_cost_text(data)}; write {data['path']}?", err=True)


def _write(merged: nn.Module, out: Path, tokenizer: Any, dense: bool) -> None:
    import lowra.api
    from lowra.runtime.checkpoint_writer import written_whole

    if not dense:
        lowra.api.save(merged, out, tokenizer=tokenizer)
        return
    model: Any = merged
    with written_whole(out) as folder:
        model.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)


def _cost_text(data: dict[str, Any]) -> str:
    return (
        f"merging costs {data['kl']:.5f} nats of KL per token, where the adapter is worth "
        f"{data['adapter_kl']:.5f}"
    )


def _render(console: Console, data: dict[str, Any]) -> None:
    facts = {
        "base": data["base"],
        "adapter": data["adapter"],
        "merged": "dense weights" if data["dense"] else "compiled anew with the base's recipe",
        "perplexity": f"{data['perplexity']:.4f} with the adapter, "
        f"{data['merged_perplexity']:.4f} merged",
        "cost": f"{data['kl']:.5f} nats of KL per token, over {data['tokens']:,} tokens",
        "adapter's worth": f"{data['adapter_kl']:.5f} nats: KL of the base without it",
    }
    print_facts(console, facts)
    if data["written"]:
        console.print(f"wrote {data['path']}", soft_wrap=True)
