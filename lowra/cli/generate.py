"""lowra generate: what a model writes after a prompt."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer

from lowra.cli.options import (
    ActivationsOption,
    DeviceOption,
    Dtype,
    DtypeOption,
    JsonOption,
    ModelArgument,
    VerboseOption,
    reading,
)
from lowra.cli.sources import device_of, load_source, require_tokenizer


def generate_text(
    ctx: typer.Context,
    model: ModelArgument,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="What the text begins with.")],
    tokens: Annotated[int, typer.Option(min=1, help="How many tokens at most.")] = 50,
    sample: Annotated[
        bool, typer.Option("--sample", help="Draw tokens; without, take the likeliest.")
    ] = False,
    adapter: Annotated[
        Path | None,
        typer.Option(metavar="ADAPTER", help="A packed or a PEFT adapter to write with."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of what --sample draws.")] = 0,
    dtype: DtypeOption = Dtype.bfloat16,
    activations: ActivationsOption = None,
    device: DeviceOption = None,
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Continue PROMPT with MODEL. The same seed gives the same text."""
    import torch

    from lowra.compiler.errors import LowraError
    from lowra.compiler.progress import show_progress, stage
    from lowra.workflows import evaluate
    from lowra.workflows.with_adapter import with_adapter

    place = device_of(device)
    with show_progress(), reading(activations):
        loaded, tokenizer = load_source(model, dtype)
        tokenizer = require_tokenizer(tokenizer, model)
        if not evaluate.tokenise(prompt, tokenizer):
            raise LowraError("the prompt has no tokens: give at least one word")
        loaded = loaded.to(place)
        torch.manual_seed(seed)
        served = nullcontext() if adapter is None else with_adapter(loaded, adapter.expanduser())
        with served, stage("generate", None):
            text = evaluate.sample(loaded, tokenizer, prompt, tokens=tokens, greedy=not sample)
    data = {
        "model": model, "adapter": None if adapter is None else str(adapter), "prompt": prompt,
        "text": text, "sampled": sample, "seed": seed, "device": str(place),
    }  # fmt: skip
    ctx.obj.show(data, lambda console: console.print(prompt + text, soft_wrap=True))
