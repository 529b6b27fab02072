"""Adapters served from a pool: the right ones, in the right rows, within the pool's bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import lowra
from lowra.compiler.errors import AdapterError
from lowra.runtime.adapter_view import base_of
from lowra.runtime.compiled import compiled
from lowra.runtime.serving.batch import SiteMix
from lowra.runtime.serving.pool import AdapterPool
from tests.runtime.compiled_models import end_to_end, low_llama, output
from tests.runtime.peft_models import adapted, own, saved
from tests.runtime.served_models import (
    ALL,
    CLOSE,
    alone,
    biased_llama,
    folder,
    ids_of,
    in_memory,
    llama,
    pool_of,
    run,
)  # fmt: skip


@pytest.mark.parametrize("kind", ALL)
def test_one_adapter_for_all_equals_the_model_with_it(kind: str) -> None:
    pool, ids = pool_of(llama().compiled, kind), ids_of(3)
    with pool.use(kind):
        got = run(pool.model, ids)
    torch.testing.assert_close(got, run(alone(kind), ids), **CLOSE)
    assert not torch.allclose(got, run(llama().compiled, ids), **CLOSE)


def test_dora_rescales_the_product_and_not_the_bias(tmp_path: Path) -> None:
    model, ids = biased_llama().compiled, ids_of(2)
    dora = adapted(model, use_dora=True, target_modules=["q_proj", "up_proj", "down_proj"])
    with torch.no_grad():
        for name, parameter in dora.named_parameters():
            if "magnitude" in name:
                parameter.mul_(1.5)
    saved(dora, tmp_path / "dora")
    pool = AdapterPool(model, 1 << 20)
    pool.add("dora", tmp_path / "dora")
    pool.add("lora", in_memory(model, 0))
    with pool.use(["dora", "lora"]):
        got = run(model, ids)
    torch.testing.assert_close(got[0], run(dora, ids)[0], **CLOSE)
    with pool.use("lora"):
        torch.testing.assert_close(got[1], run(model, ids)[1], **CLOSE)


def test_a_mixed_batch_equals_each_sequence_alone() -> None:
    names = [*ALL, None, "dora", "lora"]
    pool, ids = pool_of(llama().compiled, *ALL), ids_of(len(names))
    with pool.use(names):
        got = run(pool.model, ids)
    for i, name in enumerate(names):
        want = run(llama().compiled if name is None else alone(name), ids[i : i + 1])
        torch.testing.assert_close(got[i : i + 1], want, **CLOSE)


def test_adapters_by_token_are_those_of_the_tokens() -> None:
    """Without attention between them: one linear's output, token by token."""
    pool, ids = pool_of(llama().compiled, "lora", "packed-wide"), ids_of(2, 3)
    seen: list[torch.Tensor] = []
    layer = pool.model.get_submodule("model.layers.0.self_attn.q_proj")
    hook = layer.register_forward_hook(lambda _m, _x, y: seen.append(y))
    table = [["lora", None, "packed-wide"], [None, "packed-wide", {"lora": 0.5}]]
    try:
        with pool.use(table):
            run(pool.model, ids)
        for choice in ("lora", "packed-wide", None, {"lora": 0.5}):
            with pool.use(choice):
                run(pool.model, ids)
            where = [
                (i, t) for i, row in enumerate(table) for t, c in enumerate(row) if c == choice
            ]
            for i, t in where:
                torch.testing.assert_close(seen[0][i, t], seen[-1][i, t], **CLOSE)
            assert where
    finally:
        hook.remove()


def test_a_weighted_sum_is_the_sum_of_the_changes() -> None:
    pool, ids = pool_of(llama().compiled, "lora", "packed-wide"), ids_of(2)
    name = "model.layers.0.self_attn.q_proj"
    layer, x = pool.model.get_submodule(name), torch.randn(2, 4, 64)
    outputs = {}
    for key, choice in {
        "none": None, "a": "lora", "b": "packed-wide", "sum": {"lora": 0.5, "packed-wide": -2.0},
    }.items():  # fmt: skip
        with pool.use(choice), torch.no_grad():
            outputs[key] = layer(x)
    none = outputs["none"]
    want = none + 0.5 * (outputs["a"] - none) - 2 * (outputs["b"] - none)
    torch.testing.assert_close(outputs["sum"], want, **CLOSE)
    assert run(pool.model, ids).shape[0] == 2


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"num_beams": 2, "use_cache": False}])
def test_generate_serves_each_prompt_its_adapter(options: dict[str, Any]) -> None:
    names = ["packed-wide", None, "dora", "lora"]
    pool, ids = pool_of(llama().compiled, *ALL), ids_of(4)
    fixed = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    got = pool.generate(ids, adapters=names, **fixed, **options)
    for i, name in enumerate(names):
        model: Any = llama().compiled if name is None else alone(name)
        want = model.generate(input_ids=ids[i : i + 1], **fixed, **options)
        assert torch.equal(got[i], want[0]), name


def test_serving_touches_no_tensor_of_the_base() -> None:
    model = llama().compiled
    before = {n: (t.data_ptr(), t.clone()) for n, t in model.state_dict().items()}
    pool, ids = pool_of(model, "lora", "packed-wide"), ids_of(2)
    bare = run(model, ids)
    for name in ("lora", "packed-wide", "lora"):
        with pool.use(name):
            run(model, ids)
    pool.add("lora", folder("wide"), replace=True)
    with pool.use("lora"):
        torch.testing.assert_close(run(model, ids), run(alone("wide"), ids), **CLOSE)
    pool.remove("lora")
    after = {n: (t.data_ptr(), t) for n, t in model.state_dict().items()}
    assert {n: p for n, (p, _) in before.items()} == {n: p for n, (p, _) in after.items()}
    assert all(torch.equal(before[n][1], after[n][1]) for n in before)
    assert torch.equal(run(model, ids), bare)


def test_an_adapter_in_place_of_the_models_own_one(tmp_path: Path) -> None:
    """And one on top of it, and none, in one batch: the fingerprint tells which is which."""
    model, ids = low_llama().compiled, ids_of(3)
    changed = own(model)
    with torch.no_grad():
        for parameter in changed.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.05)
    lowra.save_adapter(changed, tmp_path / "instead")
    pool = AdapterPool(model, 1 << 20)
    pool.add("instead", tmp_path / "instead")
    pool.add("above", folder("lora"))
    with pool.use(["instead", "above", None]):
        got = run(model, ids)
    above = lowra.load_adapter(own(model), folder("lora"), on_top=True)
    for i, alone_ in enumerate((changed, above, model)):
        torch.testing.assert_close(got[i], run(alone_, ids)[i], **CLOSE)
    with pytest.raises(AdapterError, match="'above' stands on top.*'instead' in its place"):
        pool.use({"instead": 1, "above": 1}).__enter__()
    info = compiled(model)
    assert info is not None and base_of(model, info) != base_of(model, info, with_adapter=True)


def test_the_least_recently_used_leaves_and_the_pinned_stays() -> None:
    page = 1024
    sizes = pool_of(llama().compiled, "lora", page_bytes=page)
    with sizes.use("lora"):
        pages = sizes.status().used_bytes // page
    pool = AdapterPool(llama().compiled, 3 * pages * page, page_bytes=page)
    for name in "abcd":
        pool.add(name, folder("lora"))
    pool.pin("a")
    for name in ("b", "c", "b", "d"):
        with pool.use(name):
            pass
    status = pool.status()
    assert status.resident == ("a", "b", "d") and status.evictions == 1 and status.loads == 4
    with pytest.raises(
        AdapterError, match=r"no room for adapter 'd'.*1 adapters are pinned \('a'\)"
    ):
        pool.use(["b", "c", "d"]).__enter__()
    with pool.use(["a", "b", "c"]):
        assert set(pool.status().resident) == {"a", "b", "c"}
    pool.unpin("a")
    with pool.use(["b", "c", "d"]):
        assert set(pool.status().resident) == {"b", "c", "d"}
    for name in "abcd":
        pool.remove(name)
    assert pool.status().used_bytes == 0 and len(pool) == 0


def test_prefetch_brings_adapters_in_the_background() -> None:
    pool = pool_of(llama().compiled, "lora", "packed-wide")
    pool.prefetch("lora", "packed-wide", "lora")
    with pool.use(["lora", "packed-wide"]):
        assert pool.status().loads == 2
    pool.prefetch("lora")
    with pool.use("lora"):
        assert pool.status().loads == 2


def test_adapters_that_share_a_basis_hold_it_once() -> None:
    pool = pool_of(llama().compiled, "vera", page_bytes=512)
    pool.add("again", folder("vera"))
    with pool.use("vera"):
        one = pool.status().used_bytes
    with pool.use(["vera", "again"]):
        two = pool.status().used_bytes
    assert two - one == pool.size_bytes("again") < one - pool.size_bytes("vera")
    pool.remove("vera")
    with pool.use("again"):
        assert pool.status().used_bytes == one
    pool.remove("again")
    assert pool.status().used_bytes == 0


@pytest.mark.parametrize("name", ["tiny_gpt2", "tiny_t5", "tiny_bert", "plain_mlp"])
def test_other_models_serve_too(name: str) -> None:
    """Conv1D, encoder-decoders, encoders and plain modules: mixed equals one by one."""
    case = end_to_end(name)
    pool = AdapterPool(case.compiled, 1 << 21)
    for i in range(2):
        pool.add(f"{i}", in_memory(case.compiled, i), on_top=bool(i))
    first = next(iter(case.inputs.values()))
    choices = ["0", "1"] if len(first) == 2 else ["0"] * len(first)
    with pool.use(choices):
        got = output(case.compiled, case.inputs)
    for i, choice in enumerate(choices):
        with pool.use(choice):
            want = output(case.compiled, case.inputs)
        torch.testing.assert_close(got[i], want[i], **CLOSE)
    assert not torch.allclose(got, output(case.compiled, case.inputs), **CLOSE)


def test_beams_of_an_encoder_decoder_take_their_prompts_adapter() -> None:
    """The encoder sees prompts, the decoder beams."""
    model: Any = end_to_end("tiny_t5").compiled
    pool = AdapterPool(model, 1 << 21)
    for i in range(2):
        pool.add(f"{i}", in_memory(model, i))
    ids = ids_of(2)
    fixed = {"max_new_tokens": 4, "num_beams": 3, "do_sample": False, "min_new_tokens": 4}
    got = pool.generate(ids, adapters=["0", "1"], **fixed)
    for i in range(2):
        want = pool.generate(ids[i : i + 1], adapters=f"{i}", **fixed)
        assert torch.equal(got[i], want[0])


def test_layers_are_told_the_largest_rank_of_a_batch() -> None:
    """Kernels make room by it."""
    pool = pool_of(llama().compiled, "lora", "wide")
    for names in (["wide", "lora"], ["lora", "wide"]):
        with pool.use(names):
            mixes = {name: layer.served for name, layer in pool._layers.items()}
        ranks = {name: mix.rank for name, mix in mixes.items() if isinstance(mix, SiteMix)}
        assert ranks["model.layers.0.self_attn.q_proj"] == 9  # of 9 and 4
        assert ranks["model.layers.0.self_attn.k_proj"] == 2  # "lora" leaves it alone
