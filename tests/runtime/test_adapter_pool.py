"""Adapters served from a pool: the right ones, in the right rows, within the pool's bytes."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

import lowra
from lowra.compiler.errors import AdapterError
from lowra.runtime.adapter_pool import AdapterPool
from lowra.runtime.adapter_view import base_of
from lowra.runtime.compiled import compiled
from tests.runtime.compiled_models import low_llama
from tests.runtime.peft_models import own
from tests.runtime.served_models import ALL, alone, folder, ids_of, llama, pool_of, run

CLOSE: dict[str, Any] = {"rtol": 2e-4, "atol": 2e-4}


@pytest.mark.parametrize("kind", ALL)
def test_one_adapter_for_all_equals_the_model_with_it(kind: str) -> None:
    pool, ids = pool_of(llama().compiled, kind), ids_of(3)
    with pool.use(kind):
        got = run(pool.model, ids)
    torch.testing.assert_close(got, run(alone(kind), ids), **CLOSE)
    assert not torch.allclose(got, run(llama().compiled, ids), **CLOSE)


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


def test_a_prefetch_that_fails_raises_where_it_is_used(tmp_path: Path) -> None:
    shutil.copytree(folder("packed-lora"), tmp_path / "a")
    file = next(tmp_path.glob("a/*.safetensors"))
    data = file.read_bytes()
    file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    pool = AdapterPool(llama().compiled, 1 << 20)
    pool.add("a", tmp_path / "a")  # only the header is read, which is sound
    pool.prefetch("a")
    with pytest.raises(AdapterError, match="differ from their checksum; the file was damaged"):
        pool.use("a").__enter__()
    assert pool.status().used_bytes == 0


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


def test_mistakes_are_named() -> None:
    pool = pool_of(llama().compiled, "lora")
    with pytest.raises(AdapterError, match="no adapter 'lara' is registered; nearest: lora"):
        pool.use(["lora", "lara"]).__enter__()
    with pytest.raises(AdapterError, match="registered already: pass replace=True"):
        pool.add("lora", folder("wide"))
    with pool.use("lora"):
        with pytest.raises(AdapterError, match="in use by a batch and cannot be removed"):
            pool.remove("lora")
        with pytest.raises(AdapterError, match="in use by a batch and cannot be replaced"):
            pool.add("lora", folder("wide"), replace=True)
        with pytest.raises(AdapterError, match="serves a batch already"):
            pool.use(None).__enter__()
    with pool.use(["lora", None]), pytest.raises(AdapterError, match=r"inputs \[3, 6, k\].*2 seq"):
        run(pool.model, ids_of(3))
    with pytest.raises(AdapterError, match="no name and finite weight"):
        pool.use({"lora": float("nan")}).__enter__()
    with pytest.raises(AdapterError, match="no sequence is given"):
        pool.use([]).__enter__()
    with pytest.raises(AdapterError, match="unequal numbers of tokens"):
        pool.use([["lora"], ["lora", None]]).__enter__()
    with pytest.raises(AdapterError, match="page holds|a page has 64 bytes"):
        AdapterPool(llama().compiled, 10)
    with pytest.raises(AdapterError, match="not compiled by lowra"):
        AdapterPool(llama().dense, 1 << 20)
    tiny = AdapterPool(llama().compiled, 1 << 20, page_bytes=64)
    tiny.add("lora", folder("lora"))
    with pytest.raises(AdapterError, match=r"one row of 96 values takes 384 bytes.*page_bytes=512"):
        tiny.use("lora").__enter__()
    with pytest.raises(AdapterError, match="the pool has 1,024: make it larger"):
        AdapterPool(llama().compiled, 1024, page_bytes=1024).add("a", folder("wide"))
    assert pool.status().used_bytes and run(pool.model, ids_of(3)).shape[0] == 3


def test_an_adapter_of_another_base_is_refused(tmp_path: Path) -> None:
    pool = AdapterPool(llama().compiled, 1 << 20)
    lowra.save_adapter(low_llama().compiled, tmp_path / "other")
    with pytest.raises(AdapterError, match="made for another (model|compile)"):
        pool.add("other", tmp_path / "other")
    lowra.compress_adapter(tmp_path / "other", tmp_path / "packed")
    with pytest.raises(AdapterError, match="made for another (model|compile)"):
        pool.add("packed", tmp_path / "packed")
    pool.add("packed", tmp_path / "packed", check_base=False)
    with pytest.raises(AdapterError, match="adapts layers.0.up, which is not here; nearest"):
        factors = (torch.zeros(2, 4), torch.zeros(4, 2), 1.0)
        pool.add("strange", {"layers.0.up": factors})
    with pytest.raises(AdapterError, match=r"q_proj \[4, 4\], here it is \[64, 64\]"):
        pool.add("small", {"model.layers.0.self_attn.q_proj": factors})
    with pytest.raises(AdapterError, match="without a single linear"):
        pool.add("empty", {})
    assert pool.names == ("packed",)


def test_a_folder_that_changes_after_it_was_registered_is_noticed(tmp_path: Path) -> None:
    shutil.copytree(folder("packed-lora"), tmp_path / "a")
    pool = AdapterPool(llama().compiled, 1 << 20)
    pool.add("a", tmp_path / "a")
    shutil.rmtree(tmp_path / "a")
    shutil.copytree(folder("packed-wide"), tmp_path / "a")
    with pytest.raises(AdapterError, match="changed on disk since it was registered"):
        pool.use("a").__enter__()
    pool.add("a", tmp_path / "a", replace=True)
    with pool.use("a"):
        want = run(alone("packed-wide"), ids_of(1))
        torch.testing.assert_close(run(pool.model, ids_of(1)), want, **CLOSE)


def test_a_pool_under_random_load_serves_the_right_adapter_and_leaks_nothing() -> None:
    """Names swapped, evicted, prefetched and removed at random, from two threads."""
    model, ids = llama().compiled, ids_of(1, 3)
    kinds = ["lora", "rslora", "packed-lora", "packed-wide"]
    truth = {kind: run(alone(kind), ids) for kind in kinds}
    generator = torch.Generator().manual_seed(0)

    def draw(count: int) -> int:
        return int(torch.randint(count, (1,), generator=generator))

    pool = pool_of(model, pages=12, page_bytes=1024)
    holds: dict[str, str] = {}
    stop = threading.Event()

    def prefetch() -> None:
        while not stop.wait(0.002):
            for name in list(holds):
                try:
                    pool.prefetch(name)
                except AdapterError:  # removed meanwhile
                    continue

    other = threading.Thread(target=prefetch)
    other.start()
    try:
        for _ in range(60):
            name, kind = f"n{draw(5)}", kinds[draw(len(kinds))]
            if name not in holds or draw(4) == 0:
                pool.add(name, folder(kind), replace=name in holds)
                holds[name] = kind
            elif draw(6) == 0:
                pool.remove(name)
                del holds[name]
                continue
            with pool.use(name):
                torch.testing.assert_close(run(model, ids), truth[holds[name]], **CLOSE)
    finally:
        stop.set()
        other.join()
    assert pool.status().evictions > 0
    for name in pool.names:
        with pool.use(name):  # waits for what is on its way
            pass
        pool.remove(name)
    assert pool.status().used_bytes == 0
