"""Perplexity and KL by stored bits: lowra and its peers on one model, one text, one protocol.

    python -m benchmarks.quality [--methods default lowra nf4 hqq ...] [--bits 2.25 ...] [--tune]
    python -m benchmarks.quality --list

SmolLM2-135M, WikiText-2 test, 32 windows of 1024 tokens, calibration on as much of WikiText-2
valid, every linear but the head compressed, no fine-tuning, adapters off. Every method is charged
for all that it stores. Budgets (`--bits`) are lowra's; a peer has the sizes that it has. Peers come
with `pip install '.[bench]'`; one that is not there is named in the results and keeps the rows that
it has. A row is written as soon as it is measured, and measured again when its code has changed or
`--rerun` names it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.quality import chart, ours
from benchmarks.quality.peers import PEERS, Peer, unmeasured
from benchmarks.quality.protocol import PROTOCOL, Task, smollm2_task
from benchmarks.quality.rows import (
    ORIGINAL,
    Job,
    Row,
    add_row,
    code_version,
    is_finished,
    missing_by_reason,
    read_document,
)
from benchmarks.results_file import FOLDER
from lowra.compiler.progress import show_progress

METHODS = (*ours.PRESETS, *PEERS)
COLUMNS = ("name", "stored_bits", "perplexity", "kl", "perplexity_with_adapter", "seconds")


def main() -> None:
    arguments = parse()
    console = Console()
    document = read_document()
    if arguments.list:
        return list_methods(console, document["rows"])
    for file in arguments.merge:
        document = merge(file, arguments.methods)
    if arguments.methods != ["none"] and not arguments.merge:
        task = smollm2_task(arguments.data, arguments.work_dir)
        with show_progress():
            document = run(task, arguments, document, console)
    console.print(table_of(document["rows"], document["missing"]))
    for line in chart.draw(document["rows"], document["missing"], FOLDER):
        console.print(line)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--methods", nargs="+", default=list(METHODS), choices=(*METHODS, "none"), metavar="NAME",
        help=f"of {', '.join(METHODS)}; 'none' only draws what there is",
    )  # fmt: skip
    parser.add_argument("--bits", type=float, nargs="+", default=list(ours.BUDGETS))
    parser.add_argument("--tune", action="store_true", help="lowra's presets with tuning, too")
    parser.add_argument("--rerun", nargs="+", default=[], metavar="NAME", help="rows or methods")
    parser.add_argument("--only", nargs="+", default=[], metavar="ROW", help="no rows but these")
    parser.add_argument("--keep", action="store_true", help="keep rows of other code versions")
    parser.add_argument(
        "--merge", type=Path, nargs="+", default=[], metavar="FILE",
        help="measure nothing; take the rows of --methods from another quality.json",
    )  # fmt: skip
    parser.add_argument("--list", action="store_true", help="methods, their rows, what is missing")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--work-dir", type=Path, default=Path("lowra-demo/quality-work"))
    return parser.parse_args()


def run(
    task: Task, arguments: argparse.Namespace, document: dict[str, Any], console: Console
) -> dict[str, Any]:
    """Measure what is asked for and not finished; every row is saved when it is there."""
    rows = document["rows"]
    found: dict[str, str | None] = {}
    for job in jobs(task, arguments, found):
        if arguments.only and job.name not in (*arguments.only, ORIGINAL):
            continue
        if is_finished(job, rows, rerun=arguments.rerun, keep=arguments.keep):
            found[job.name] = None
            continue
        try:
            row = job.row()
        except Exception as error:  # another package's failure must not lose the other rows
            if job.method not in PEERS:
                raise
            found[job.name] = f"{type(error).__name__}: {error}".split("\n")[0]
            console.print(f"{job.name}: {found[job.name]}")
            continue
        found[job.name] = None
        rows = add_row(PROTOCOL, found, row)["rows"]
        console.print(row)
    return add_row(PROTOCOL, {**unmeasured(rows), **found}, None)


def merge(file: Path, methods: list[str]) -> dict[str, Any]:
    """Take the rows of `methods`, and why their others are missing, from another document."""
    other = json.loads(file.read_text())
    if other["protocol"] != PROTOCOL:
        raise SystemExit(f"{file} was measured under another protocol: {other['protocol']}")
    names = {name for method in methods if method in PEERS for name in PEERS[method].settings}
    missing = {k: why for k, why in other["missing"].items() if k in names or k in methods}
    document = add_row(PROTOCOL, missing, None)
    for row in other["rows"]:
        if row["method"].removesuffix(ours.TUNED) in methods:
            document = add_row(PROTOCOL, missing, row)
    return document


def jobs(task: Task, arguments: argparse.Namespace, found: dict[str, str | None]) -> Iterator[Job]:
    """The rows that the command asks for; why a method has none goes into `found`."""
    yield original_job(task)
    version = code_version()
    for preset in (name for name in ours.PRESETS if name in arguments.methods):
        for tune in (False, True) if arguments.tune else (False,):
            method = preset + ours.TUNED * tune
            found[method] = ours.tuning_missing() if tune else None
            if found[method] is None:
                for bits in arguments.bits:
                    settings = ours.settings_of(preset, bits, tune)
                    yield our_job(task, method, settings, version)
    for peer in (PEERS[name] for name in arguments.methods if name in PEERS):
        if peer.missing() is None:
            for name in peer.settings:
                yield peer_job(task, peer, name)


def original_job(task: Task) -> Job:
    def measure() -> Row:
        return {"stored_bits": 16.0, "perplexity": task.score_original().perplexity, "kl": 0.0}

    return Job(ORIGINAL, ORIGINAL, {}, "bfloat16", measure)


def our_job(task: Task, method: str, settings: dict[str, Any], version: str) -> Job:
    name = f"{method} {settings['bit_budget']:g}"
    return Job(name, method, settings, version, lambda: ours.measure(task, settings))


def peer_job(task: Task, peer: Peer, name: str) -> Job:
    settings = peer.settings[name]

    def measure() -> Row:
        made = peer.quantize(task, settings)
        result = task.score_weights(made.weights)
        row = {
            "stored_bits": made.bits / task.weight_count, "perplexity": result.perplexity,
            "kl": result.kl, **({"facts": dict(made.facts)} if made.facts else {}),
        }  # fmt: skip
        if made.adapters is not None:
            both = {n: w.float() + made.adapters[n] for n, w in made.weights.items()}
            adapted = task.score_weights(both)
            row |= {
                "adapter_bits": made.adapter_bits / task.weight_count,
                "perplexity_with_adapter": adapted.perplexity, "kl_with_adapter": adapted.kl,
            }  # fmt: skip
        return row

    return Job(name, peer.name, settings, peer.version() or "", measure)


def table_of(rows: list[Row], missing: dict[str, str]) -> Table:
    missing_lines = [f"missing: {line}" for line in missing_by_reason(missing)]
    table = Table(title="WikiText-2 test, by stored bits", caption="\n".join(missing_lines))
    for column in COLUMNS:
        table.add_column(column.replace("_", " "), justify="right")
    for row in sorted(rows, key=lambda row: -row.get("stored_bits", 0.0)):
        values = [row.get(column) for column in COLUMNS]
        table.add_row(*(f"{v:,.3f}" if isinstance(v, float) else str(v or "") for v in values))
    return table


def list_methods(console: Console, rows: list[Row]) -> None:
    table = Table("method", "what", "rows", "here")
    for preset in ours.PRESETS:
        count = sum(row["method"].removesuffix(ours.TUNED) == preset for row in rows)
        table.add_row(preset, f"lowra, preset {preset!r}", str(count), ours.tuning_missing() or "")
    for peer in PEERS.values():
        have = {row["name"] for row in rows}
        names = ", ".join(f"{name}{'' if name in have else '?'}" for name in peer.settings)
        table.add_row(peer.name, peer.title, names, peer.version() or peer.missing())
    console.print(table)


if __name__ == "__main__":
    main()
