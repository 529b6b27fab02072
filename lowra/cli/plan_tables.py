"""A plan as text: sites, sizes, what was measured or estimated."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lowra.cli.tables import (
    assignment_text,
    bytes_text,
    group_alike,
    print_facts,
    print_skipped,
    print_table,
    seconds_text,
    shape_text,
    widths_text,
)

if TYPE_CHECKING:
    from rich.console import Console


def render_plan(console: Console, plan: Mapping[str, Any]) -> None:
    """The tables of a plan before a compile, given as `Plan.to_dict` has it."""
    measured = plan["measured"]
    if measured is None:
        _print_sites(console, plan)
    else:
        _print_measured_sites(console, plan)
    print_skipped(console, plan["skipped"])
    print_facts(console, _facts(plan))
    _print_stages(console, plan["estimates"], {} if measured is None else measured["seconds"])
    if measured is None:
        _print_estimates(console, plan["estimates"])
    else:
        print_facts(console, _measured_facts(plan, measured))
    if "written" in plan:
        console.print(f"wrote {plan['written']}", soft_wrap=True)


def _print_sites(console: Console, plan: Mapping[str, Any]) -> None:
    rows = [
        (name, shape_text(site["shape"]), f"{count * site['shape'][0] * site['shape'][1]:,}")
        for name, site, count in group_alike(plan["sites"], "shape")
    ]
    print_table(console, "to compress", ("site", "shape>", "weights>"), rows)


def _print_measured_sites(console: Console, plan: Mapping[str, Any]) -> None:
    rows = [
        (
            site["name"], shape_text(site["shape"]), widths_text(site["rows"]),
            f"{site['expected_loss']:.4g}",
        )
        for site in plan["sites"]
    ]  # fmt: skip
    print_table(console, "to compress", ("site", "shape>", "rows", "expected loss>"), rows)


def _print_stages(
    console: Console, found: Mapping[str, Any], measured: Mapping[str, float]
) -> None:
    """Seconds of each stage, measured where it ran and estimated where not, and peak memory."""
    rows: list[tuple[str, ...]] = []
    for stage in found["stages"]:
        ran = measured.get(stage["name"])
        took = () if not measured else ("" if ran is None else f"{ran:.1f} s",)
        memory = bytes_text(stage["peak_bytes"])
        rows.append((stage["name"], *took, seconds_text(stage["seconds"]), memory))
    took = (f"{measured['total']:.1f} s",) if measured else ()
    rows.append(("all", *took, seconds_text(found["seconds"]), bytes_text(found["peak_bytes"])))
    title = "time and memory" if measured else "time and memory, estimated"
    times = ("measured>", "estimated>") if measured else ("time>",)
    print_table(console, title, ("stage", *times, "peak memory>"), rows)


def _print_estimates(console: Console, found: Mapping[str, Any]) -> None:
    error = found["error"]
    print_facts(
        console,
        {
            "estimated error": f"{error['relative_error']:.3g} of a layer's output energy",
            "": error["obtained"],
            "estimated time": found["obtained"],
        },
    )


def _measured_facts(plan: Mapping[str, Any], measured: Mapping[str, Any]) -> dict[str, str]:
    return {
        "rows": widths_text(measured["rows"]),
        "stored bits": f"{measured['stored_bits']:.3f} per weight "
        f"({bytes_text(measured['stored_bytes'])})",
        "rotated": f"{measured['rotated_inputs']} of {measured['inputs']} inputs",
        "assignment": assignment_text(plan["assignment"]),
        "against one width": comparison_text(plan["assignment"]["uniform"]),
        "calibration": f"{measured['calibration_tokens']:,} tokens",
        "estimated time": plan["estimates"]["obtained"],
    }


def comparison_text(found: Mapping[str, Any] | None) -> str:
    """Which plan was kept on held-out data, and by how much."""
    if found is None:
        return "not compared"
    kept = "one width for all rows" if found["uniform"] < found["mixed"] else "the mixed plan"
    return (
        f"on held-out data {found['mixed']:.4g} mixed, {found['uniform']:.4g} with all rows at "
        f"{found['width']} bit: kept {kept}"
    )


def _facts(plan: Mapping[str, Any]) -> dict[str, str]:
    counted = plan["recipe"]["count_adapters"]
    counts = plan["counts"]
    beside = "at most, within the budget" if counted else "beside it"
    about = "" if plan["measured"] else "at most "
    return {
        "sites": f"{len(plan['sites'])}, {plan['weights']:,} weights",
        "budget": f"{plan['bit_budget']:g} {counts} per weight",
        "reachable": f"{plan['lowest_bits']:.3f} to {plan['highest_bits']:.3f} {counts} per weight",
        "dense": bytes_text(plan["dense_bytes"]),
        "compressed": f"at most {bytes_text(plan['largest_bytes'])}",
        "adapter": f"{bytes_text(plan['adapter_bytes'])} {beside}",
        "checkpoint": f"{about}{bytes_text(plan['file_bytes'])}, with all that stays as it is",
        "pipeline": plan["pipeline"],
    }
