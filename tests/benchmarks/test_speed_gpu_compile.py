"""The benchmark of a compile's parts without a GPU: what it sends, and what it counts."""

from __future__ import annotations

import pytest

from benchmarks.speed import gpu_compile
from tests.compiler.test_offload import Watched


@pytest.mark.usefixtures("everything_travels")
def test_every_part_does_its_work_on_the_device() -> None:
    place = Watched()
    (row,) = gpu_compile.rows_of({(48, 32): (2, 1)}, place, 0.0)
    assert {*row["seconds"]} == {"moments", "factor", "lloyd", "feedback", "descent"}
    fitted = ("moments", "lloyd_shared", "feedback_codes", "descend_codes")
    sent = {f"lowra::{name}" for name in fitted} | {"aten::linalg_cholesky_ex"}
    assert sent <= {*place.ops}


def test_a_model_is_counted_from_its_layers() -> None:
    rows = [
        {"n": 10, "k": 20, "count": 2, "inputs": 1, "seconds": {"lloyd": 0.5, "factor": 1.0}},
        {"n": 5, "k": 20, "count": 1, "inputs": 0, "seconds": {"lloyd": 1.0, "factor": 9.0}},
    ]
    model = gpu_compile.whole(rows, 3)
    assert model["weights"] == 1500 and model["codebook_weights_per_second"] == 250
    assert model["seconds"] == {"lloyd": 6.0, "factor": 3.0, "all": 9.0}
    assert gpu_compile.table_of(rows, model).row_count == 3
