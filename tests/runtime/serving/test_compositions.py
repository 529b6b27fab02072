"""Adapters together: ensembles, LoRA-Flow's gates, mixtures by retrieval; against formulas."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

from lowra.compiler.errors import AdapterError
from lowra.runtime.serving.ensemble import Ensemble, ensemble
from lowra.runtime.serving.flow_gates import FlowGates
from lowra.runtime.serving.index import INSTRUCTION, AdapterIndex
from lowra.runtime.serving.pool import AdapterPool
from tests.runtime.compiled_models import end_to_end
from tests.runtime.served_models import (
    CLOSE,
    alone,
    biased_llama,
    ids_of,
    in_memory,
    llama,
    pool_of,
    run,
)  # fmt: skip


def test_an_ensemble_is_every_adapter_on_every_sequence() -> None:
    names = ["lora", None, "packed-wide"]
    pool, ids = pool_of(llama().compiled, "lora", "packed-wide"), ids_of(2)
    got = ensemble(pool, names, input_ids=ids, attention_mask=torch.ones_like(ids))
    each = [run(alone(name) if name else llama().compiled, ids) for name in names]
    torch.testing.assert_close(got.members, torch.stack(each), **CLOSE)
    torch.testing.assert_close(got.logits, sum(each[1:], each[0]) / 3, **CLOSE)
    shares = [one.softmax(-1) for one in each]
    torch.testing.assert_close(got.probabilities, sum(shares[1:], shares[0]) / 3, **CLOSE)
    assert bool((got.disagreement > 0).all()) and got.disagreement.shape == ids.shape


def test_disagreement_is_the_mutual_information_of_token_and_member() -> None:
    p = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.3, 0.6]], dtype=torch.float64)
    mean = p.mean(dim=0)
    want = float((p * (p / mean).log()).sum(dim=1).mean())
    found = Ensemble(p.log().view(2, 1, 1, 3))
    assert found.disagreement.item() == pytest.approx(want)
    assert found.entropy.item() == pytest.approx(float(-(mean * mean.log()).sum()))
    same = Ensemble(p[:1].log().expand(3, 3).reshape(3, 1, 1, 3))
    assert same.disagreement.item() == pytest.approx(0, abs=1e-12)


def test_ensembles_of_nothing_are_refused() -> None:
    pool = pool_of(llama().compiled, "lora")
    with pytest.raises(AdapterError, match="no adapters"):
        ensemble(pool, [], input_ids=ids_of(1))
    with pytest.raises(AdapterError, match=r"batches of \[1, 2\]"):
        ensemble(pool, ["lora"], input_ids=ids_of(1), attention_mask=ids_of(2))


def gates_of(model: Any) -> FlowGates:
    gates = FlowGates(model, ["lora", "packed-wide"], temperature=1.1)
    with torch.no_grad():
        for parameter in gates.parameters():
            parameter.normal_(std=0.5)
    return gates


@functools.cache
def two_layers() -> AdapterPool:
    """A pool of a model whose layers have gates of their own."""
    pool = AdapterPool(biased_llama().compiled, 1 << 21)
    for seed, name in enumerate(("lora", "packed-wide")):
        pool.add(name, in_memory(pool.model, seed))
    return pool


def seen(model: Any, ids: Tensor, layer: str, site: str) -> dict[str, Tensor]:
    """The inputs of the layer, and input and output of one of its linears."""
    found: dict[str, Tensor] = {}

    def before(_m: Any, inputs: tuple[Tensor, ...]) -> None:
        found["layer"] = inputs[0]

    def after(_m: Any, inputs: tuple[Tensor, ...], y: Tensor) -> None:
        found["x"], found["y"] = inputs[0], y

    hooks = [
        model.get_submodule(layer).register_forward_pre_hook(before),
        model.get_submodule(f"{layer}.{site}").register_forward_hook(after),
    ]
    try:
        run(model, ids)
    finally:
        for hook in hooks:
            hook.remove()
    return found


@pytest.mark.parametrize("site", ["self_attn.q_proj", "mlp.down_proj"])
@pytest.mark.parametrize("place", [0, 1])
def test_gates_weigh_each_adapter_by_token_as_lora_flow_does(place: int, site: str) -> None:
    pool, ids, layer = two_layers(), ids_of(2), f"model.layers.{place}"
    gates = gates_of(pool.model)
    with gates.use(pool):
        values = seen(pool.model, ids, layer, site)
    linear = pool.model.get_submodule(f"{layer}.{site}")
    outputs = []
    for name in (None, "lora", "packed-wide"):
        with pool.use(name), torch.no_grad():
            outputs.append(linear(values["x"]))
    w = (values["layer"] @ gates.weight[place].T / 1.1).softmax(-1) + gates.bias[place]
    base = outputs[0]
    want = base + w[..., :1] * (outputs[1] - base) + w[..., 1:] * (outputs[2] - base)
    torch.testing.assert_close(values["y"], want.detach(), **CLOSE)


def test_gates_train_and_nothing_else_does() -> None:
    pool, ids = two_layers(), ids_of(2)
    model: Any = pool.model
    gates = FlowGates(model, ["lora", "packed-wide"])
    assert [list(p.shape) for p in gates.parameters()] == [[2, 2, 64], [2, 2]]
    optimizer, losses = torch.optim.Adam(gates.parameters(), lr=0.1), []
    for _ in range(5):
        with gates.use(pool):
            loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.01, losses
    assert all(bool(p.detach().flatten(1).any(dim=1).all()) for p in gates.parameters())
    assert not any(p.requires_grad for p in model.parameters())


def test_gates_without_meaning_are_refused() -> None:
    for adapters, temperature in ((["lora"], 1.0), (["lora", "lora"], 1.0), (["a", "b"], 0.0)):
        with pytest.raises(AdapterError, match="two or more adapters, each once"):
            FlowGates(llama().compiled, adapters, temperature)


def test_gates_of_other_rows_than_a_layers_inputs_are_refused() -> None:
    """As many weights in another order would be the wrong tokens' ones."""
    pool, ids = pool_of(llama().compiled, "lora", "packed-wide"), ids_of(2)
    with pool.use({"lora": 1.0, "packed-wide": 1.0}) as batch:
        for rows in ((2, 4), (12,), (1, 12)):
            batch.gate = lambda _, rows=rows: torch.ones(*rows, 2)
            shown = ", ".join(map(str, rows))
            match = rf"q_proj is given tokens \[2, 6\].*for \[{shown}\]"
            with pytest.raises(AdapterError, match=match):
                run(pool.model, ids)


def test_gates_of_an_encoder_decoder_are_refused() -> None:
    """Its cross-attention reads tokens that no layer of the decoder is given."""
    with pytest.raises(AdapterError, match="cross-attention"):
        FlowGates(end_to_end("tiny_t5").compiled, ["a", "b"])


VECTORS = {"sum": [1.0, 0.0, 0.0], "code": [0.0, 1.0, 0.0], "poem": [0.0, 0.0, 2.0]}


def embed(texts: Any) -> Tensor:
    """A vector per text by the words in it; each was given the instruction."""
    assert all(text.startswith(INSTRUCTION) for text in texts)
    rows = [
        sum((torch.tensor(v) for word, v in VECTORS.items() if word in text), torch.full((3,), 0.1))
        for text in texts
    ]
    return torch.stack(rows)


def test_retrieval_picks_and_weighs_by_similarity() -> None:
    index = AdapterIndex(embed)
    index.add("math", ["a sum", "sum and sum"])
    index.add("python", ["code", "more code"])
    index.add("verse", ["poem"])
    (choice,) = index.choose(["code for a sum"], top=2, temperature=0.5)
    assert set(choice) == {"math", "python"} and sum(choice.values()) == pytest.approx(1)
    unit = embed([f"{INSTRUCTION}code for a sum", f"{INSTRUCTION}sum", f"{INSTRUCTION}code"])
    unit = torch.nn.functional.normalize(unit, dim=1)
    shares = (unit[0] @ unit[1:].T / 0.5).softmax(0).tolist()
    assert [choice["math"], choice["python"]] == pytest.approx(shares)
    assert index.choose(["poem"], top=1) == [{"verse": 1.0}]
    assert index.choose(["poem"], top=9, uniform=True)[0] == pytest.approx(
        dict.fromkeys(("math", "python", "verse"), 1 / 3)
    )


def test_a_retrieved_mixture_is_what_a_pool_serves() -> None:
    pool, ids = pool_of(llama().compiled, "lora", "packed-wide"), ids_of(2)
    index = AdapterIndex(embed)
    index.add("lora", ["sum"])
    index.add("packed-wide", ["code"])
    with pool.use(index.choose(["sum", "a poem of code"], top=1)):
        got = run(pool.model, ids)
    for i, name in enumerate(("lora", "packed-wide")):
        torch.testing.assert_close(got[i], run(alone(name), ids)[i], **CLOSE)


def test_an_index_names_mistakes() -> None:
    index = AdapterIndex(embed)
    with pytest.raises(AdapterError, match="index is empty"):
        index.choose(["sum"])
    with pytest.raises(AdapterError, match="'a' is described by no sample"):
        index.add("a", [])
    index.add("a", ["sum"])
    with pytest.raises(AdapterError, match="top=0"):
        index.choose(["sum"], top=0)
    with pytest.raises(AdapterError, match=r"2 texts gave \[1, 3\]"):
        AdapterIndex(lambda _: torch.zeros(1, 3)).add("a", ["x", "y"])
