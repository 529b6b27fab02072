"""The benchmark of what compressed adapters keep, on a tiny compiled model."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.adapters import gain, gain_chart
from benchmarks.adapters.baselines.jd_diagonal import jd_diagonal
from benchmarks.adapters.tasks import CONTEXT, IGNORED, Rows, loss_of, packed
from lowra.adapters.factors import LowRank
from tests.runtime.compiled_models import low_llama


class Letters:
    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        assert not add_special_tokens
        return {"input_ids": [ord(letter) for letter in text]}


def test_prompts_are_read_and_not_scored() -> None:
    rows = packed([("ab", "c"), ("d", "ef")] * CONTEXT, Letters(), 2)
    assert rows.ids.shape == rows.labels.shape == (2, CONTEXT)
    assert rows.ids[0, :6].tolist() == [ord(letter) for letter in "abcdef"]
    assert rows.labels[0, :6].tolist() == [IGNORED, IGNORED, ord("c"), IGNORED, ord("e"), ord("f")]


def examples() -> Rows:
    ids = torch.randint(3, 100, (3, 24), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[:, :8] = IGNORED
    return Rows(ids, labels)


def test_the_loss_is_that_of_the_labels() -> None:
    model: Any = copy.deepcopy(low_llama().compiled).eval()
    rows = examples()
    with torch.no_grad():
        both = [model(input_ids=i[None], labels=w[None]).loss for i, w in zip(*rows, strict=True)]
    assert loss_of(model, rows) == pytest.approx(float(sum(both)) / 3, rel=1e-5)


def test_every_seed_starts_from_an_a_of_its_own() -> None:
    """Seed 0 from what the model came with, and any where the start is not drawn at random."""
    made = gain.factors_of(low_llama().compiled)
    zero = [LowRank(f.name, f.a, 0 * f.b, 1.0) for f in made]
    assert gain.started(zero, 0) == zero and gain.started(made, 1) == made
    first, again, second = (gain.started(zero, seed) for seed in (1, 1, 2))
    for f, one, same, other in zip(zero, first, again, second, strict=True):
        assert torch.equal(one.a, same.a) and not torch.equal(one.a, other.a)
        assert not torch.equal(one.a, f.a) and one.a.shape == f.a.shape and not one.b.any()
        assert 0.9 * f.k**-0.5 < float(one.a.abs().max()) <= f.k**-0.5
    assert not torch.equal(first[0].a[:, :8], first[1].a[:, :8])


@pytest.mark.parametrize("seed", [0, 3])
def test_the_start_of_a_seed_is_kept_in_a_file(tmp_path: Path, seed: int) -> None:
    model: Any = copy.deepcopy(low_llama().compiled)
    gain._trained(model, "a base", examples(), 1, seed, tmp_path / "adapter.safetensors")
    name = "start-a_base.safetensors" if seed == 0 else "start-a_base-seed_3.safetensors"
    assert {file.name for file in tmp_path.iterdir()} == {name, "adapter.safetensors"}


def test_shares_lie_between_the_base_and_the_whole_adapter(tmp_path: Path) -> None:
    model: Any = copy.deepcopy(low_llama().compiled)
    rows, file = examples(), tmp_path / "adapter.safetensors"
    gain._trained(model, "tiny", rows, 12, 0, file)
    adapter, done = gain._read(file), {}
    for name, compress in gain.methods(adapter, lambda: gain.grams_of(model, rows, adapter)):
        if name in ("lowra 3", "BIN", "GPTQ 4", "LoRAQuant 3@0.9 search"):
            gain._add_row(model, rows, adapter, name, compress, done)
    assert done["with"]["loss"] < done["without"]["loss"]
    assert done["lowra 3"]["bits"] <= 3 and done["lowra 3"]["share"] > 0.5
    for name in ("BIN", "GPTQ 4"):
        row = done[name]
        span = done["without"]["loss"] - done["with"]["loss"]
        assert row["share"] == pytest.approx((done["without"]["loss"] - row["loss"]) / span)
    assert len(gain.spectrum(adapter)) == adapter[0].rank
    assert gain_chart.points({"one": done})["lowra"] == [
        (done["lowra 3"]["bits"], done["lowra 3"]["share"])
    ]


def test_every_adapter_gets_its_own_of_those_compressed_together() -> None:
    one = gain.factors_of(low_llama().compiled)
    family = [one, [LowRank(f.name, f.a, 2 * f.b, f.scaling) for f in one]]
    made = [gain._one_of(lambda rank: jd_diagonal(family, rank), 3, place) for place in (0, 1)]
    for name, (a, b) in made[0].factors.items():
        other, twice = made[1].factors[name]
        torch.testing.assert_close(twice @ other, 2 * b @ a, rtol=2e-3, atol=1e-6)
