"""What the charts of fine-tuning and of GPU products draw."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks.finetune import chart
from benchmarks.speed import roofline


def trained(base: str, bits: float, perplexity: float, seed: int = 0, steps: int = 60) -> Any:
    return {"base": base, "optimizer": "adamw", "steps": steps, "seed": seed,
            "stored_bits": bits, "perplexity": perplexity}  # fmt: skip


TRAINED = {
    str(i): row for i, row in enumerate([
        trained("original", 16.0, 16.0), trained("default 2", 2.0, 24.0),
        trained("default 2", 2.0, 26.0, seed=1), trained("default 1.5", 1.5, 34.0),
        trained("loftq-2", 2.5, 1e4), trained("default 2 all", 2.0, 22.0, steps=200),
        {**trained("default 3", 3.0, 19.0), "optimizer": "oplora"},
    ])
}  # fmt: skip
MEASURED: list[dict[str, Any]] = [
    {"case": case, "n": n, "k": 8192, "m": m, "bytes": size, "lowra_us": us, "dense_us": 40.0 * m}
    for case, n, size, us in (("2 bits", 8192, 1 << 24, 16.0), ("1 bit", 8192, 1 << 23, 8.0),
                              ("2 bits", 4096, 1 << 23, 10.0))
    for m in (4, 1)
]  # fmt: skip


def test_bases_of_one_kind_are_one_line_of_means_over_seeds() -> None:
    assert chart.series(TRAINED, 60) == {
        "original": [(16.0, 16.0)], "default": [(1.5, 34.0), (2.0, 25.0)], "loftq": [(2.5, 1e4)],
    }  # fmt: skip
    assert chart.series(TRAINED, 200) == {"default all": [(2.0, 22.0)]}
    assert {chart.family_of(b) for b in ("default 2 tuned all", "default 1.5 tuned all")} <= set(
        chart.COLOURS
    )


def test_points_under_the_roof_are_operations_by_bytes() -> None:
    found = roofline.series(MEASURED)
    assert set(found) == {"2 bits", "1 bit", "torch bfloat16"}
    first = found["2 bits"][0]  # one token
    assert first[0] == pytest.approx(2 * 8192**2 / (2**24 + 4 * 8192))
    assert first[1] == pytest.approx(2 * 8192**2 / 16e-6)
    read, compute = roofline.roof(MEASURED)
    assert read == pytest.approx((2 * 8192**2 + 4 * 8192) / 40e-6)
    assert compute == pytest.approx(2 * 8192**2 / 40e-6)


def test_charts_are_the_same_bytes_twice(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    for draw, data, name in (
        (chart.draw, {"rows": TRAINED}, "finetune_quality"),
        (roofline.draw, {"rows": MEASURED, "gpu": "A GPU"}, "speed_gpu_roofline"),
    ):
        assert draw(data, tmp_path) == [f"wrote {name}.png", f"wrote {name}.svg"]
        first = (tmp_path / f"{name}.svg").read_bytes()
        draw(data, tmp_path)
        assert (tmp_path / f"{name}.svg").read_bytes() == first


def test_nothing_trained_is_no_chart(tmp_path: Path) -> None:
    assert chart.draw({"rows": {}}, tmp_path) == ["no chart: no row was trained with adamw"]
