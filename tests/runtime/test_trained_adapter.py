"""Adapters of other kinds on a compiled model: they train, leave as folders, and are served."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lowra.compiler.errors import AdapterError
from lowra.runtime.module_view import quantized_linears
from lowra.runtime.serving.pool import AdapterPool
from lowra.runtime.trained_adapter import (
    MANIFEST,
    WEIGHTS,
    TrainedAdapter,
    load_trained,
    new_adapter,
    save_trained,
)
from tests.runtime.served_models import CLOSE, ids_of, llama, run, wrapped

TARGETS = ("*q_proj", "*down_proj")
OPTIONS: dict[str, dict[str, Any]] = {
    "lora-xs": {"rank": 6, "scaling": 2.0},
    "nola": {"rank": 4, "count": 24},
    "multi-lora": {"rank": 2, "count": 2},
}
RATES = {"lora-xs": 0.5, "nola": 0.02, "multi-lora": 0.05}


def trained(kind: str, steps: int = 6) -> tuple[TrainedAdapter, list[float]]:
    """An adapter after a few steps on one batch, and the losses."""
    model: Any = llama().compiled
    adapter, ids = new_adapter(model, kind, TARGETS, **OPTIONS[kind]), ids_of(2)
    optimizer = torch.optim.Adam(adapter.parameters(), lr=RATES[kind])
    losses = []
    for _ in range(steps):
        with adapter.on(model):
            loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    return adapter, losses


@pytest.mark.parametrize("kind", OPTIONS)
def test_each_kind_trains_saves_and_is_served_as_it_was_trained(kind: str, tmp_path: Path) -> None:
    model, ids = llama().compiled, ids_of(3)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    adapter, losses = trained(kind)
    assert losses[-1] < losses[0] - 0.02, losses
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
    with adapter.on(model):
        want = run(model, ids)
    save_trained(adapter, model, tmp_path / "a")
    pool = AdapterPool(model, 1 << 21)
    pool.add("live", adapter.delta())
    pool.add("file", tmp_path / "a")
    with pool.use(["live", "file", None]):
        got = run(model, ids)
    torch.testing.assert_close(got[:2], want[:2], **CLOSE)
    torch.testing.assert_close(got[2], run(model, ids)[2], **CLOSE)
    assert not torch.allclose(got[:2], run(model, ids)[:2], **CLOSE)
    stored = load_file(tmp_path / "a" / WEIGHTS)
    assert sum(t.numel() for t in stored.values()) == sum(p.numel() for p in adapter.parameters())


OF_THE_PAPER = {
    "dora": ("lora_A.", "lora_B.", "lora_magnitude_vector."),  # arXiv 2402.09353, section 4
    "vera": ("vera_lambda_b.", "vera_lambda_d."),  # arXiv 2310.11454, section 3.1
}


@pytest.mark.parametrize("kind", OF_THE_PAPER)
def test_a_step_in_peft_trains_what_the_paper_trains_and_nothing_else(kind: str) -> None:
    model: Any = wrapped(kind, llama().compiled).train()
    tensors = dict((*model.named_parameters(), *model.named_buffers()))
    before = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    ids, losses = ids_of(2), list[float]()
    optimizer = torch.optim.Adam((p for p in model.parameters() if p.requires_grad), lr=0.01)
    for _ in range(2):
        loss = model(input_ids=ids, labels=ids).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        if len(losses) == 1:
            optimizer.step()
    assert losses[1] < losses[0] - 0.005, losses
    changed = {name for name, tensor in tensors.items() if not torch.equal(tensor, before[name])}
    parts = OF_THE_PAPER[kind]
    assert changed == {name for name in tensors if any(f".{part}" in name for part in parts)}
    assert all(sum(part in name for name in changed) == 2 for part in parts), "of both linears"


def test_two_adapters_of_lora_xs_share_their_basis_in_a_pool() -> None:
    pool = AdapterPool(llama().compiled, 1 << 21, page_bytes=512)
    for name in ("a", "b"):
        adapter = new_adapter(pool.model, "lora-xs", TARGETS, rank=6)
        pool.add(name, adapter.delta())
    with pool.use("a"):
        one = pool.status().used_bytes
    with pool.use(["a", "b"]):
        assert pool.status().used_bytes - one == pool.size_bytes("b") <= 1024


def test_mistakes_are_named(tmp_path: Path) -> None:
    model = llama().compiled
    with pytest.raises(AdapterError, match="no adapter kind 'nolla'; nearest: nola"):
        new_adapter(model, "nolla")
    with pytest.raises(AdapterError, match="no linear matches x_proj; nearest"):
        new_adapter(model, "nola", ("x_proj",))
    with pytest.raises(AdapterError, match="takes no such option"):
        new_adapter(model, "nola", TARGETS, ranks=3)
    with pytest.raises(AdapterError, match="not compiled by lowra"):
        new_adapter(llama().dense, "nola")
    adapter = new_adapter(model, "nola", TARGETS, **OPTIONS["nola"])
    pool = AdapterPool(model, 1 << 21)
    pool.add("a", adapter.delta())
    with pool.use("a"), pytest.raises(AdapterError, match="serves adapters already"):
        adapter.on(model).__enter__()
    folder = save_trained(adapter, model, tmp_path / "a")
    file = folder / MANIFEST
    text = file.read_text()
    file.write_text(text.replace('"count":24', '"count":25'))
    with pytest.raises(AdapterError, match="damaged or edited"):
        load_trained(folder, quantized_linears(model))
    file.write_text(text)
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(AdapterError, match="differs from its checksum"):
        load_trained(folder, quantized_linears(model))
    with pytest.raises(AdapterError, match="down_proj, which is not here"):
        load_trained(folder, {})
