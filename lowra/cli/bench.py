"""lowra bench: how fast packed products and a compressed model run on this machine."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from lowra.cli.options import (
    ActivationsOption,
    Dtype,
    DtypeOption,
    JsonOption,
    VerboseOption,
    reading,
)
from lowra.cli.sources import load_source, require_tokenizer
from lowra.cli.tables import print_facts, print_table

if TYPE_CHECKING:
    from rich.console import Console

PROMPT = "The history of the city begins with"


def bench(
    ctx: typer.Context,
    model: Annotated[
        str | None,
        typer.Argument(metavar="MODEL", help="A compressed model; without, standard shapes."),
    ] = None,
    reference: Annotated[
        str | None, typer.Option(metavar="MODEL", help="The original, to compare writing with.")
    ] = None,
    tokens: Annotated[
        list[int] | None, typer.Option(min=1, help="Tokens per product; repeatable. [1, 16, 512]")
    ] = None,
    seconds: Annotated[float, typer.Option(min=0.0, help="Time for each line.")] = 1.0,
    threads: Annotated[int | None, typer.Option(min=1, help="By default as torch has.")] = None,
    dtype: DtypeOption = Dtype.bfloat16,
    activations: ActivationsOption = None,
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Measure packed products beside dense ones by turns, and how fast MODEL writes."""
    import torch

    from lowra.compiler.progress import show_progress, stage
    from lowra.workflows.bench import bench_model, bench_shapes

    before, counts = torch.get_num_threads(), tuple(tokens or (1, 16, 512))
    torch.set_num_threads(threads or before)
    try:
        with show_progress(), stage("bench", None), reading(activations):
            data: dict[str, Any] = {"model": model, "threads": torch.get_num_threads()}
            if model is None:
                timings = bench_shapes(counts, getattr(torch, dtype.value), seconds)
            else:
                loaded, tokenizer = load_source(model, dtype)
                timings = bench_model(loaded, counts, seconds)
            data["products"] = [timing.to_dict() for timing in timings]
            if model is not None and tokenizer is not None:
                data["tokens_per_second"] = _writing(loaded, tokenizer, reference, dtype)
    finally:
        torch.set_num_threads(before)
    ctx.obj.show(data, lambda console: _render(console, data))


def _writing(loaded: Any, tokenizer: Any, reference: str | None, dtype: Dtype) -> dict[str, float]:
    from lowra.workflows.bench import tokens_per_second

    models = {"compressed": loaded}
    if reference is not None:
        models["reference"], other = load_source(reference, dtype)
        tokenizer = tokenizer or require_tokenizer(other, reference)
    prompt = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    return tokens_per_second(models, prompt, tokens=32)


def _render(console: Console, data: dict[str, Any]) -> None:
    rows = [
        (
            line["kernel"], f"{line['n']} x {line['k']}", f"{line['bits']:.2f}", str(line["m"]),
            f"{1e6 * line['seconds']:,.0f}", f"{line['bytes'] / 1e6:.1f}",
            f"{line['rate'] / 1e9:.1f}", f"{line['share_of_read_rate']:.0%}",
            f"{line['ratio']:.2f}",
        )
        for line in data["products"]
    ]  # fmt: skip
    columns = (
        "kernel", "weight", "bits>", "tokens>", "us>", "MB>", "GB/s>", "of read rate>",
        "times dense>",
    )  # fmt: skip
    print_table(console, f"products on {data['threads']} threads", columns, rows)
    written = data.get("tokens_per_second")
    if written:
        print_facts(console, {f"{name} tokens/s": f"{rate:.1f}" for name, rate in written.items()})
