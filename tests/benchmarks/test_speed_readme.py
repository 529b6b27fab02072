"""What the README tells of speed, from a few made-up results."""

from __future__ import annotations

from typing import Any

from benchmarks.speed.readme import assigning, fitting, gpu, serving, speed

WHERE = {"date": "2026-11-25", "processor": "A CPU", "threads": 2}
PRODUCTS = [
    {"n": 8, "k": 16, "bits": bits, "m": m, "ratio": bits + m} for bits in (1.0, 4.0)
    for m in (1, 16)
]  # fmt: skip


def test_every_product_has_its_cell_and_every_part_its_sentence() -> None:
    parts: dict[str, Any] = {
        "products": {**WHERE, "result": PRODUCTS},
        "onnx": {**WHERE, "result": [{"onnx_over_lowra": 1.5}, {"onnx_over_lowra": 2.25}]},
        "activations": {
            **WHERE,
            "result": {
                "products": [
                    {"activations": "int8", "m": 16, "ratio": ratio} for ratio in (1.7, 2.3)
                ],
                "kl": {"int16": 0.5, "int8": 0.51},
                "stored_bits": 2.0,
            },
        },
        "lora": {**WHERE, "result": [{"ratio": 1.02}, {"ratio": 1.08}]},
        "start": {**WHERE, "result": {"first_use_seconds": 2.3, "cached_seconds": 0.003}},
    }
    text = "\n".join(speed({"parts": parts}))
    assert "| 8 x 16 | 1.0 | 2.00 | 17.00 |" in text
    assert "| 8 x 16 | 4.0 | 5.00 | 20.00 |" in text
    assert "1.50 to 2.25 times as long" in text
    assert "at most 8%" in text
    assert "int8: times as fast as dense, 1.70 to 2.30 with 16 (A CPU, 2 threads" in text
    assert "int16 0.50000, int8 0.51000" in text
    assert "2.3 s to build, 3 ms from the cache" in text


def test_a_missing_peer_leaves_its_sentence_out() -> None:
    parts: dict[str, Any] = {
        "products": {**WHERE, "result": PRODUCTS},
        "onnx": {**WHERE, "result": {"missing": "not installed: onnx"}},
        "model": {**WHERE, "result": {"missing": "give --model"}},
    }
    text = "\n".join(speed({"parts": parts}))
    assert "MatMulNBits" not in text
    assert "tokens/s" not in text


def test_the_slowest_and_the_loosest_are_told() -> None:
    rows = [
        {"method": "knapsack", "seconds": 1.7, "gap": 1e-9},
        {"method": "knapsack", "seconds": 2.7, "gap": 3e-7},
        {"method": "two-level (LowRA)", "seconds": 16.0, "gap": 1.0},
    ]
    data = {"rows": 1000, "environment": WHERE, "results": rows}
    assert "1.7 to 2.7 s, proven within 3e-07" in " ".join(assigning(data))
    fits = [{"weights_per_second_per_width": rate} for rate in (78e6, 451e6)]
    assert "78 to 451 million" in " ".join(fitting({"rows": fits, "environment": WHERE} | WHERE))


def test_serving_names_sizes_and_times() -> None:
    data = {
        "registered": 1000, "rank": 16, "model": "a model", "resident": 64, "file_bytes": 1000000,
        "bytes_in_pool": 1010000, "swap_in_ms": {"median": 41.7}, "batch": 32, "environment": WHERE,
        "step_ms": {"no adapter": 10.2, "one adapter": 12.4, "as many as sequences": 15.1},
    }  # fmt: skip
    text = " ".join(serving(data))
    for words in ("1,000 packed", "1.01 MB each (+1.0%", "42 ms", "10 ms", "12 with", "15 with"):
        assert words in text


def test_a_gpu_has_its_table_and_its_name() -> None:
    rows = [{"case": "2 bits", "n": 8, "k": 16, "m": m, "ratio": 1.5 * m} for m in (1, 4)]
    versions = {"torch": "9.9", "date": "2026-11-26"}
    text = "\n".join(gpu({"gpu": "A GPU", "environment": versions, "rows": rows}))
    assert "(A GPU, torch 9.9, 2026-11-26" in text
    assert "| 8 x 16 | 2 bits | 1.50 | 6.00 |" in text


def test_integers_on_a_gpu_have_a_table_where_they_were_measured() -> None:
    rows = [{"n": 8, "k": 16, "case": "2 bits", "m": m, "ratio": 1.5} for m in (1, 16)]
    where = {"torch": "2.11", "date": "2026-11-28"}
    text = "\n".join(gpu({"environment": where, "gpu": "A GPU", "rows": rows}))
    assert "set_activations" not in text
    rows[0]["int8_ratio"] = 4.5
    text = "\n".join(gpu({"environment": where, "gpu": "A GPU", "rows": rows}))
    assert text.count("set_activations") == 1 and "| 8 x 16 | 2 bits | 4.50 |" in text
