"""What the documents tell of compressed adapters, from adapters_gain.json."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from statistics import mean
from typing import Any


def gain(data: Mapping[str, Any]) -> Iterator[str]:
    """The share of its gain that an adapter keeps, by method: means over the adapters measured."""
    protocol, rows, where = data["protocol"], data["rows"], data["environment"]
    yield (
        f"{protocol['model']}, LoRA of rank {protocol['rank']} on every linear but the head, "
        f"trained by {protocol['optimizer']}; share kept of what the adapter lowers the held-out "
        f"loss by ({where['date']}, `benchmarks/results/adapters_gain.json`). Adapters: "
        f"{'; '.join(rows)}."
    )
    yield ""
    yield "| method | stored bits | " + " | ".join(_short(name) for name in rows) + " | mean |"
    yield "|---" * (len(rows) + 3) + "|"
    methods = list(dict.fromkeys(m for done in rows.values() for m in done if "share" in done[m]))
    bits = {m: mean(done[m]["bits"] for done in rows.values() if m in done) for m in methods}
    for method in sorted(methods, key=lambda m: -bits[m]):
        shares = [done[method]["share"] if method in done else None for done in rows.values()]
        cells = " | ".join("" if share is None else f"{share:.1%}" for share in shares)
        name = f"**{method}**" if method.startswith("lowra") else method
        known = mean(share for share in shares if share is not None)
        yield f"| {name} | {bits[method]:.3f} | {cells} | {known:.1%} |"
    yield ""
    picture = "../benchmarks/results/adapters_gain.png"
    yield f"![Share of the gain by stored bits, and spectra]({picture})"


def _short(name: str) -> str:
    """`nf4 / wikitext / 80 steps / seed 0` as `nf4, wikitext`."""
    return ", ".join(name.split(" / ")[:2])
