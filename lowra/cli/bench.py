"""lowra bench: how fast packed products and a compressed model run on this machine, and tuning."""

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
    refuse_options,
)
from lowra.cli.sources import load_source, require_tokenizer
from lowra.cli.tables import print_facts, print_table

if TYPE_CHECKING:
    from rich.console import Console

TUNED_TOKENS = (1, 2, 4, 8, 16, 64, 256, 1024)
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
    tune: Annotated[
        bool, typer.Option("--tune", help="Find the fastest blocks on this GPU, and keep them.")
    ] = False,
    dtype: DtypeOption = Dtype.bfloat16,
    activations: ActivationsOption = None,
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Measure packed products beside dense ones by turns, and how fast MODEL writes.

    With --tune, measure instead which blocks of the GPU kernels are the fastest for its weights,
    or for standard shapes; later products on a GPU of this name use what was found.
    """
    import torch

    from lowra.compiler.progress import show_progress, stage
    from lowra.workflows.bench import bench_model, bench_shapes

    if tune:
        refuse_options(ctx, ("reference", "seconds", "threads", "activations"), "--tune")
        return _tune(ctx, model, tuple(tokens or TUNED_TOKENS), dtype)
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


def _tune(ctx: typer.Context, model: str | None, tokens: tuple[int, ...], dtype: Dtype) -> None:
    import torch

    from lowra.compiler.packing import width_id
    from lowra.compiler.progress import show_progress
    from lowra.workflows.bench import SHAPES, WIDTHS, random_weight, weights_of
    from lowra.workflows.tune_kernels import require_device, tune

    device = require_device()
    with show_progress():
        if model is None:
            kinds = [(width, trellis) for width in WIDTHS for trellis in (False, True)
                     if not trellis or width_id(width, True) != width_id(width)]  # fmt: skip
            weights = (random_weight(n, k, w, trellis=t) for n, k in SHAPES for w, t in kinds)
        else:
            weights = (alike[0].stored() for alike in weights_of(load_source(model, dtype)[0]))
        found = [line.to_dict() for line in tune(weights, tokens, getattr(torch, dtype.value))]
    data = {"model": model, "device": device, "tuned": found}
    ctx.obj.show(data, lambda console: _render_tuned(console, data))


def _render_tuned(console: Console, data: dict[str, Any]) -> None:
    rows = [
        (
            line["case"], ", ".join(f"{name} {value}" for name, value in line["choice"].items()),
            f"{line['microseconds']:.1f}", f"{line['usual_microseconds']:.1f}",
            f"{line['tried']}", f"{line['failed']}",
        )
        for line in data["tuned"]
    ]  # fmt: skip
    columns = ("case", "fastest", "us>", "us by rule>", "tried>", "no room>")
    print_table(console, f"kernels tuned on {data['device']}", columns, rows)


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
