"""Ours and a stand-in peer under the protocol, on a tiny random model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.quality import __main__ as command
from benchmarks.quality import ours
from benchmarks.quality.peers import PEERS, Peer, Quantized, unmeasured
from benchmarks.quality.peers.column_energy import column_energy
from benchmarks.quality.protocol import Task, with_weights
from lowra.workflows.evaluate import evaluate
from tests import models


@pytest.fixture
def task(tmp_path: Path) -> Task:
    model = models.tiny_llama(tied=True)
    tokens = torch.randint(0, models.VOCAB, (4, 32))
    return Task(model, None, Path("none"), tokens[:2], tokens[2:], tmp_path)


def own_weights(task: Task) -> dict[str, Tensor]:
    return {name: site.weight.detach().clone() for name, site in task.sites.items()}


def test_sites_are_every_linear_but_the_head(task: Task) -> None:
    assert len(task.sites) == 2 * 7
    assert not any("lm_head" in name for name in task.sites)


def test_the_original_has_no_divergence_from_itself(task: Task) -> None:
    result = task.score_weights(own_weights(task))
    assert result.kl == pytest.approx(0.0, abs=1e-9)
    assert result.perplexity == task.score_original().perplexity


def test_remembered_logits_score_as_the_original_does(task: Task) -> None:
    weights = {name: weight.round(decimals=2) for name, weight in own_weights(task).items()}
    changed = with_weights(task.model, weights)
    direct = evaluate(changed, task.test, reference=task.model, batch=1)
    for _ in range(2):
        again = task.score(changed)
        assert (again.perplexity, again.kl) == (direct.perplexity, direct.kl)


def test_a_method_must_give_every_weight_finite_and_in_shape(task: Task) -> None:
    name = next(iter(task.sites))
    for wrong in (None, torch.zeros(1, 1), torch.full_like(task.sites[name].weight, torch.nan)):
        weights: dict[str, Any] = own_weights(task)
        weights.pop(name) if wrong is None else weights.update({name: wrong})
        with pytest.raises(ValueError, match=name.replace(".", r"\.")):
            with_weights(task.model, weights)


def test_column_energy_is_the_mean_square_of_the_input(task: Task) -> None:
    embedded = task.model.model.embed_tokens(task.calibration)  # type: ignore[union-attr]
    normed = task.model.model.layers[0].input_layernorm(embedded)  # type: ignore[union-attr]
    expected = normed.detach().square().mean((0, 1))
    found = column_energy(task)["model.layers.0.self_attn.q_proj"]
    assert torch.allclose(found, expected, rtol=1e-5)


def test_ours_is_measured_with_its_adapters_off(task: Task) -> None:
    row = ours.measure(task, ours.settings_of("default", 3.5, tune=False))
    assert row["stored_bits"] <= 3.5
    assert row["kl"] > 0 and "kl_with_adapter" not in row


def test_the_papers_base_is_reported_with_its_adapter_too(task: Task) -> None:
    row = ours.measure(task, ours.settings_of("lowra", 3.5, tune=False))
    assert row["stored_bits"] <= 3.5
    assert row["kl_with_adapter"] != row["kl"] and row["adapter_bits"] > 0


def test_a_peers_row_counts_its_bits_and_its_adapter(task: Task) -> None:
    def halves(task: Task, settings: Mapping[str, Any]) -> Quantized:
        weights = own_weights(task)
        half = {name: weight / 2 for name, weight in weights.items()}
        return Quantized(half, 8 * task.weight_count, half, 2 * task.weight_count)

    peer = Peer("half", "Half", ("torch",), {"half-8": {"bits": 8}}, halves)
    row = command.peer_job(task, peer, "half-8").row()
    assert (row["stored_bits"], row["adapter_bits"]) == (8.0, 2.0)
    assert row["kl"] > 0
    assert row["kl_with_adapter"] == pytest.approx(0.0, abs=1e-9)
    assert row["version"].startswith("torch ")


def test_a_peer_that_is_not_installed_says_so() -> None:
    peer = Peer("ghost", "Ghost", ("no-such-package",), {}, lambda task, settings: None)  # type: ignore[arg-type,return-value]
    assert peer.missing() == "not installed: no-such-package"
    assert peer.version() is None


def test_a_peer_without_rows_is_named_and_one_with_some_by_the_rows_it_lacks() -> None:
    reasons = unmeasured([{"name": "nf4", "method": "nf4"}])
    assert "nf4-double" in reasons and "nf4" not in reasons
    assert reasons.keys() - {"nf4-double"} == PEERS.keys() - {"nf4"}


def test_budgets_are_those_of_the_table() -> None:
    assert ours.BUDGETS == (4.25, 3.25, 2.75, 2.25, 2.0, 1.75, 1.5, 1.25)
