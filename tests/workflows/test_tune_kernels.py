"""Tuning: the fastest of the choices that fit is kept, and products use it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lowra.backends.triton import tuning
from lowra.backends.triton.keys import Blocks
from lowra.backends.triton.schedule import UNPACKED, Choice, choose
from lowra.backends.triton.targets import INTERPRETER, TARGETS
from lowra.backends.triton.weight import weight_of
from lowra.compiler.errors import LowraError
from lowra.workflows import tune_kernels
from lowra.workflows.bench import random_weight
from lowra.workflows.tune_kernels import candidates, keep, tune, tune_case

pytest.importorskip("triton", reason="Triton is not installed: lowra[triton]")
CPU, BF16 = torch.device("cpu"), torch.bfloat16
pytestmark = pytest.mark.usefixtures("own_home")


def test_the_fastest_choice_is_kept_and_used(monkeypatch: pytest.MonkeyPatch) -> None:
    few = [(Blocks(32, 16, 1, 1), 1), (Blocks(32, 16, 2, 1), 1), (Blocks(64, 16, 4, 1), 2)]
    monkeypatch.setattr(tune_kernels, "FEW", few)
    copies = [random_weight(64, 512, 2, 1).op_args()] * 2
    times = iter([4e-6, 7e-6, 2e-6, 5e-6])

    def measure(runs: dict[str, Any]) -> dict[str, float]:
        run, count = runs["it"]
        assert count == 2 and run(0).shape == run(1).shape == (3, 64)
        return {"it": next(times)}

    tuned = tune_case(copies, 3, torch.float32, INTERPRETER, measure)
    weight = weight_of(copies[0])
    tried = candidates(weight, 3, torch.float32, 2, INTERPRETER)
    assert tuned.choice == tried[2] == Choice(Blocks(32, 16, 2, 1))
    assert (tuned.tried, tuned.failed) == (4, 0)
    assert tuned.microseconds == pytest.approx(2) and tuned.usual_microseconds == pytest.approx(4)
    keep("cpu", tuned)
    assert tuning.choice_for(weight, 4, torch.float32, 16, INTERPRETER, CPU) == tuned.choice
    assert tuned.to_dict()["choice"]["rows"] == 32


def test_a_choice_without_room_is_no_candidate(monkeypatch: pytest.MonkeyPatch) -> None:
    copies = [random_weight(32, 256, 2).op_args()]
    product = tune_kernels.linear.product

    def no_room(*given: Any) -> Any:
        if given[-1].blocks == Blocks(128, 16, 4, 1):
            raise RuntimeError("out of resource: shared memory")
        return product(*given)

    monkeypatch.setattr(tune_kernels, "FEW", [(Blocks(128, 16, 4, 1), 1)])
    monkeypatch.setattr(tune_kernels.linear, "product", no_room)
    tuned = tune_case(copies, 1, torch.float32, INTERPRETER, lambda runs: {"it": 1e-6})
    assert tuned.choice == tuned.usual and (tuned.tried, tuned.failed) == (1, 1)


@pytest.mark.parametrize(("n", "k"), [(4096, 4096), (64, 53248)])
def test_candidates_are_different_and_may_unpack_for_many_tokens(n: int, k: int) -> None:
    weight = weight_of(random_weight(n, k, 2).op_args())
    for m in (1, 16, 17, 256, 4096):
        found = candidates(weight, m, BF16, 132, TARGETS[1])
        assert len(set(found)) == len(found) >= 6
        assert found[0] == choose(weight.key, weight.panels, k, m, BF16, 132, TARGETS[1])
        assert (UNPACKED in found) is (m > 16)
        assert all(c.blocks is None or c.parts == 1 or c.blocks.tokens == 16 for c in found)
        for choice in found:
            assert tuning._parsed("it", tuning.entry_of(choice)) == choice


def test_without_a_device_tuning_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(LowraError, match="no CUDA device"):
        next(tune([], (1,), torch.bfloat16))


def test_a_damaged_table_is_not_thrown_away() -> None:
    path = tuning.own_table("cpu")
    path.parent.mkdir(parents=True)
    path.write_text("{")
    tuned = tune_kernels.Tuned("a", UNPACKED, 1.0, UNPACKED, 1.0, 1, 0)
    with pytest.raises(LowraError, match="damaged.*delete it"):
        keep("cpu", tuned)
    assert path.read_text() == "{"
