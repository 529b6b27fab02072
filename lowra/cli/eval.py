"""lowra eval: perplexity, and the divergence from a reference."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lowra.cli.options import (
    ActivationsOption,
    DeviceOption,
    Dtype,
    DtypeOption,
    JsonOption,
    ModelArgument,
    VerboseOption,
    read_text,
    reading,
)
from lowra.cli.sources import device_of, load_source, require_tokenizer
from lowra.cli.tables import print_facts

if TYPE_CHECKING:
    import torch
    from rich.console import Console
    from torch import nn

    from lowra.workflows.evaluate import Evaluation


def eval_model(
    ctx: typer.Context,
    model: ModelArgument,
    reference: Annotated[
        str | None, typer.Option(metavar="MODEL", help="The original, to measure KL against.")
    ] = None,
    text: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Held-out text; by default Python's own reference."),
    ] = None,
    windows: Annotated[int, typer.Option(min=1, help="How many windows of text.")] = 16,
    context: Annotated[int, typer.Option(min=2, help="Tokens per window.")] = 512,
    adapters: Annotated[
        bool, typer.Option("--adapters/--no-adapters", help="With the LoRA adapter, or without.")
    ] = True,
    dtype: DtypeOption = Dtype.bfloat16,
    activations: ActivationsOption = None,
    device: DeviceOption = None,
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Measure the perplexity of MODEL on held-out text and, with a reference, the mean KL."""
    from lowra.compiler.progress import show_progress
    from lowra.workflows.evaluate import held_out_english

    place = device_of(device)
    words = held_out_english() if text is None else read_text(text)
    with show_progress(), reading(activations):
        result = _evaluate(model, reference, words, windows, context, adapters, dtype, place)
    data = {
        "model": model,
        "reference": reference,
        "text": "Python's language reference" if text is None else str(text),
        "adapters": adapters,
        "activations": None if activations is None else activations.value,
        "device": str(place),
        **result.to_dict(),
    }
    ctx.obj.show(data, lambda console: _render(console, data))


def _evaluate(
    source: str, reference: str | None, text: str, count: int, context: int, adapters: bool,
    dtype: Dtype, place: torch.device,
) -> Evaluation:  # fmt: skip
    from lowra.workflows.evaluate import evaluate
    from lowra.workflows.evaluate import windows as cut

    model, tokenizer = load_source(source, dtype)
    _check_positions(model, context)
    without = nullcontext() if adapters else _without_adapters(model, source)
    tokens = cut(text, require_tokenizer(tokenizer, source), count=count, context=context)
    original = None if reference is None else load_source(reference, dtype)[0].to(place)
    with without:
        return evaluate(model.to(place), tokens, reference=original)


def _check_positions(model: nn.Module, context: int) -> None:
    """Raise LowraError for windows longer than the positions that the model knows."""
    from lowra.compiler.errors import LowraError

    config: Any = getattr(model, "config", None)
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    positions = getattr(config, "max_position_embeddings", None)
    if isinstance(positions, int) and context > positions > 0:
        raise LowraError(
            f"windows of {context} tokens are longer than the model's {positions} positions: "
            f"use --context {positions} or less"
        )


def _without_adapters(model: nn.Module, source: str) -> AbstractContextManager[None]:
    from lowra.compiler.errors import LowraError
    from lowra.runtime.compiled import compiled

    info = compiled(model)
    if info is None:
        raise LowraError(f"{source!r} has no adapters to leave out: lowra did not compile it")
    return info.adapters_disabled(model)


def _render(console: Console, data: dict[str, Any]) -> None:
    facts = {
        "model": data["model"] + ("" if data["adapters"] else " without its adapters"),
        "text": data["text"],
        "windows": f"{data['windows']} of {data['context']} tokens, {data['tokens']:,} scored",
        "perplexity": f"{data['perplexity']:.4f}",
    }
    if data["reference"] is not None:
        facts["mean KL"] = f"{data['kl']:.5f} nats per token from {data['reference']}"
    facts["seconds"] = f"{data['seconds']:.1f}"
    print_facts(console, facts)
