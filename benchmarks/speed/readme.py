"""What the README tells of speed, from speed_cpu.json, fit.json and assign.json."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any


def speed(data: Mapping[str, Any]) -> Iterator[str]:
    """Products beside torch and ONNX Runtime, and the whole model."""
    parts = data["parts"]
    yield from _products(parts["products"])
    onnx = parts.get("onnx", {}).get("result")
    if isinstance(onnx, list):
        times = [row["onnx_over_lowra"] for row in onnx]
        yield ""
        yield (
            f"ONNX Runtime's `MatMulNBits` of 2 and 4 bits (blocks of 32, which store 1 bit more) "
            f"takes {min(times):.2f} to {max(times):.2f} times as long on the same shapes and "
            "tokens."
        )
    if "activations" in parts:
        yield from _activations(parts["activations"])
    if "lora" in parts:
        worst = max(row["ratio"] for row in parts["lora"]["result"])
        yield f"LoRA of rank 16 adds at most {worst - 1:.0%} to a product of 1 or 16 tokens."
    model = parts.get("model", {}).get("result", {})
    if "generate_ratio" in model:
        yield from _model(model)
    if "start" in parts:
        start = parts["start"]["result"]
        yield (
            f"A kernel's first use takes {start['first_use_seconds']:.1f} s to build, "
            f"{1000 * start['cached_seconds']:.0f} ms from the cache afterwards."
        )


def _products(part: Mapping[str, Any]) -> Iterator[str]:
    yield (
        f"Products on packed weights, times as fast as torch's bfloat16 linear, by turns, weights "
        f"in no cache ({part['processor']}, {part['threads']} threads, {part['date']}, "
        "`benchmarks/results/speed_cpu.json`):"
    )
    yield ""
    yield from _ratios("bits", [{**row, "stored": f"{row['bits']:.1f}"} for row in part["result"]])


def gpu(data: Mapping[str, Any]) -> Iterator[str]:
    """Products on a GPU beside torch's."""
    versions = data["environment"]
    yield (
        "Products on packed weights, times as fast as torch's bfloat16 linear, by replay of CUDA "
        f"graphs, weights in no cache ({data['gpu']}, torch {versions['torch']}, "
        f"{versions['date']}, `benchmarks/results/speed_gpu.json`):"
    )
    yield ""
    rows = [{**row, "stored": row["case"]} for row in data["rows"]]
    yield from _ratios("stored in", rows)
    yield ""
    for kind in ("int8", "int16"):
        found = [{**row, "ratio": ratio} for row in rows if (ratio := row.get(f"{kind}_ratio"))]
        if found:
            yield f'The same with `lowra.set_activations("{kind}")`:'
            yield ""
            yield from _ratios("stored in", found)
            yield ""
    yield from _beside_nf4(rows)
    yield from _trellis(data.get("trellis", []))
    yield "![Products under the roof of the GPU](benchmarks/results/speed_gpu_roofline.png)"


def _beside_nf4(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    found = {
        m: [row["nf4_us"] / row["lowra_us"] for row in rows if row["m"] == m and "nf4_us" in row]
        for m in dict.fromkeys(row["m"] for row in rows)
    }
    told = [f"{min(r):.1f} to {max(r):.1f} ({m})" for m, r in found.items() if r]
    if told:
        yield f"bitsandbytes' NF4 takes so many times as long, by tokens: {', '.join(told)}."
        yield ""


def _trellis(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Of the default's codes, as far as they were measured."""
    told = [
        f"{row['ratio']:.2f} with {row['m']} {'token' if row['m'] == 1 else 'tokens'}"
        + (f" in {row['activations']}" if "activations" in row else "")
        for row in rows
    ]
    if told:
        case = f"{rows[0]['n']} x {rows[0]['k']}, {rows[0]['case']}"
        yield f"The tables are of plain codes. Of other runs that day, {case}: {', '.join(told)}."
        yield ""


def _ratios(stored: str, rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """A table of ratios: a line per weight and what it is stored in, a column per tokens."""
    tokens = sorted({row["m"] for row in rows})
    yield f"| weight | {stored} | " + " | ".join(f"{m} tokens" for m in tokens) + " |"
    yield "|---" * (2 + len(tokens)) + "|"
    found = {(row["n"], row["k"], row["stored"], row["m"]): row["ratio"] for row in rows}
    for n, k, kind in dict.fromkeys((row["n"], row["k"], row["stored"]) for row in rows):
        ratios = " | ".join(f"{found[n, k, kind, m]:.2f}" for m in tokens)
        yield f"| {n} x {k} | {kind} | {ratios} |"


def _activations(part: Mapping[str, Any]) -> Iterator[str]:
    rows, kl = part["result"]["products"], part["result"].get("kl")
    where = f"{part['processor']}, {part['threads']} threads, {part['date']}"
    for kind in dict.fromkeys(row["activations"] for row in rows):
        told = []
        for m in sorted({row["m"] for row in rows}):
            ratios = [r["ratio"] for r in rows if r["m"] == m and r["activations"] == kind]
            told.append(f"{min(ratios):.2f} to {max(ratios):.2f} with {m}")
        yield f"Activations read as {kind}: times as fast as dense, {', '.join(told)} ({where})."
    if kl:
        cost = ", ".join(f"{kind} {value:.5f}" for kind, value in kl.items())
        yield f"KL of SmolLM2-135M at {part['result']['stored_bits']:.1f} bits to dense: {cost}."


def _model(model: Mapping[str, Any]) -> Iterator[str]:
    rates = model["tokens_per_second"]
    yield (
        f"SmolLM2-135M at {model['stored_bits']:.1f} bits with LoRA of rank 16 writes "
        f"{rates['compressed']:.0f} tokens/s in transformers, the dense model {rates['dense']:.0f} "
        f"({model['generate_ratio']:.2f}x); evaluating {model['evaluated_tokens']} tokens takes "
        f"{model['evaluation_ratio']:.2f} times as long as dense, a LoRA step of "
        f"{model['step_tokens']} tokens {model['lora_step_ratio']:.2f} times as long as peft's."
    )
    written = model.get("llama_cpp", {}).get("tokens_per_second", {})
    told = [f"{kind} {rate:.0f}" for kind, rate in written.items()]
    if told:
        yield f"llama.cpp writes {', '.join(told)} tokens/s on the same threads, without Python."


def fitting(data: Mapping[str, Any]) -> Iterator[str]:
    """Codebook fitting, per candidate width."""
    rates = [row["weights_per_second_per_width"] / 1e6 for row in data["rows"]]
    where = data["environment"]
    yield (
        f"Converged Lloyd of widths 1 to 4 together: {min(rates):.0f} to {max(rates):.0f} million "
        f"weights per second and width ({where['processor']}, {data['threads']} threads, "
        f"{where['date']}, `benchmarks/results/fit.json`)."
    )


def assigning(data: Mapping[str, Any]) -> Iterator[str]:
    """The precision program at the size of LLaMA-2-7B."""
    rows = [row for row in data["results"] if row["method"] == "knapsack"]
    seconds, gaps = [row["seconds"] for row in rows], [row["gap"] for row in rows]
    yield (
        f"A width for each of {data['rows']:,} rows (the linears of LLaMA-2-7B, made-up "
        f"statistics): {min(seconds):.1f} to {max(seconds):.1f} s, proven within "
        f"{max(gaps):.0e} of the optimum ({data['environment']['date']}, "
        "`benchmarks/results/assign.json`)."
    )


def serving(data: Mapping[str, Any]) -> Iterator[str]:
    """Many packed adapters beside one base."""
    step, where = data["step_ms"], data["environment"]
    base = data["model"]
    beside = data["bytes_in_pool"] / data["file_bytes"] - 1
    yield (
        f"{data['registered']:,} packed adapters of rank {data['rank']} beside {base} in a "
        f"pool of {data['resident']}: {data['bytes_in_pool'] / 1e6:.2f} MB each ({beside:+.1%} of "
        f"the files), {data['swap_in_ms']['median']:.0f} ms to swap one in. A step of "
        f"{data['batch']} sequences takes {step['no adapter']:.0f} ms without adapters, "
        f"{step['one adapter']:.0f} with one for all, {step['as many as sequences']:.0f} with "
        f"{data['batch']} different ones (CPU time of one thread, {where['processor']}, "
        f"{where['date']}, `benchmarks/results/adapters.json`)."
    )
