"""Lines of the chart and lines of the README's table, from a few rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks import tables
from benchmarks.quality import chart

ROWS: list[dict[str, Any]] = [
    {"name": "original", "method": "original", "settings": {}, "stored_bits": 16.0,
     "perplexity": 21.0, "kl": 0.0, "version": "", "date": "2026-11-24", "seconds": 1.0},
    {"name": "default 2", "method": "default", "settings": {"bit_budget": 2.0},
     "stored_bits": 1.99, "perplexity": 40.0, "kl": 0.6, "adapter_bits": 0.5,
     "perplexity_with_adapter": 35.0, "kl_with_adapter": 0.5},
    {"name": "lowra 1.25", "method": "lowra", "settings": {}, "unreachable": "scales alone"},
    {"name": "hqq-2-axis1", "method": "hqq", "settings": {}, "stored_bits": 2.5,
     "perplexity": 3e7, "kl": 9.0},
    {"name": "hqq-2-axis0", "method": "hqq", "settings": {}, "stored_bits": 2.5,
     "perplexity": 200.0, "kl": 2.0},
    {"name": "loftq-2", "method": "loftq", "settings": {}, "stored_bits": 2.5, "perplexity": 1e5,
     "kl": 7.0, "adapter_bits": 0.75, "perplexity_with_adapter": 700.0, "kl_with_adapter": 3.0},
]  # fmt: skip
MISSING = {"gptq": "not installed: gptqmodel"}


def test_a_line_is_a_method_and_a_peers_adapter_is_another() -> None:
    assert chart.lines(ROWS, "perplexity") == {
        "default": [(1.99, 40.0)],
        "hqq": [(2.5, 200.0), (2.5, 3e7)],
        "loftq": [(2.5, 1e5)],
        "loftq+adapter": [(3.25, 700.0)],
    }


def test_a_line_runs_through_the_best_of_each_size() -> None:
    points = [(2.5, 3.0), (2.5001, 2.0), (3.1, 1.0)]
    assert chart.best_per_size(points) == [(2.5001, 2.0), (3.1, 1.0)]


def test_every_method_has_a_title_and_a_colour() -> None:
    for method in ("default", "default+tune", "lowra", "lowra+tune", *chart.PEERS):
        assert chart.title_of(method)
    assert chart.title_of("loftq+adapter") == "LoftQ with its adapter"
    assert len(chart._COLOURS) >= len(chart.PEERS)


def test_the_chart_is_drawn_with_values_off_its_scale(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    assert chart.draw(ROWS, MISSING, tmp_path) == ["wrote quality.png", "wrote quality.svg"]
    assert (tmp_path / "quality.png").read_bytes().startswith(b"\x89PNG")
    first = (tmp_path / "quality.svg").read_bytes()
    chart.draw(ROWS, MISSING, tmp_path)
    assert (tmp_path / "quality.svg").read_bytes() == first


def test_the_table_has_every_row_by_size_and_names_what_is_missing() -> None:
    document = {
        "protocol": {"model": "M", "test": "T", "windows": 2, "context": 8, "compressed": "all",
                     "calibration": "C"},
        "environment": {"date": "2026-11-24", "torch": "2"}, "rows": ROWS, "missing": MISSING,
    }  # fmt: skip
    lines = list(tables.quality(document))
    cells = [line.split(" | ") for line in lines if line.startswith("| ")][1:]
    sizes = [float(c[1]) for c in cells if c[1] != "out of reach"]
    assert sizes == sorted(sizes, reverse=True) and len(sizes) == 4
    assert any("lowra 1.25" in line and "out of reach" in line for line in lines)
    assert any("gptq" in line and "not installed: gptqmodel" in line for line in lines)
    assert "21.00" in lines[0]
