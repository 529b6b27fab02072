"""What a pool refuses: mistakes, other bases, broken files; nothing is changed by any of them."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

import lowra
from lowra.adapters.factors import LowRank
from lowra.compiler.adapter_pages import dense_run
from lowra.compiler.errors import AdapterError
from lowra.runtime.module_view import quantized_linears
from lowra.runtime.serving.pages import MOST_BYTES, lay_out
from lowra.runtime.serving.pool import AdapterPool
from lowra.runtime.serving.sources import Facts, PackedFolder
from tests.adapters.adapters import peft_folder
from tests.runtime.compiled_models import low_llama
from tests.runtime.peft_models import config, own
from tests.runtime.served_models import CLOSE, alone, folder, ids_of, llama, pool_of, run


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
        with pytest.raises(AdapterError, match="serves adapters already"):
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
    with pytest.raises(AdapterError, match=r"budget_bytes=8589934596.*8,589,934,592 bytes at most"):
        AdapterPool(llama().compiled, (1 << 33) + 4)
    with pytest.raises(AdapterError, match="not compiled by lowra"):
        AdapterPool(llama().dense, 1 << 20)
    tiny = AdapterPool(llama().compiled, 1 << 20, page_bytes=64)
    tiny.add("lora", folder("lora"))
    with pytest.raises(AdapterError, match=r"one row of 96 values takes 384 bytes.*page_bytes=512"):
        tiny.use("lora").__enter__()
    with pytest.raises(AdapterError, match="the pool has 1,024: make it larger"):
        AdapterPool(llama().compiled, 1024, page_bytes=1024).add("a", folder("wide"))
    assert pool.status().used_bytes and run(pool.model, ids_of(3)).shape[0] == 3


def test_the_last_page_of_the_largest_pool_has_an_address() -> None:
    size = 1 << 14
    image = lay_out([(("a", 0), (dense_run(torch.ones(3, 8000)),))], size)
    last = MOST_BYTES // (4 * size) - 1
    assert image.placed([7, last])[:, -1].tolist() == [7 * size, last * size]


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


Q = "model.layers.0.self_attn.q_proj"
KEY = f"base_model.model.{Q}.lora_"
BROKEN: dict[str, tuple[dict[str, torch.Tensor | None], str]] = {
    "a factor is missing": ({f"{KEY}B.weight": None}, r"q_proj has A \[4, 64\] and B \[\]"),
    "another tensor is there": ({"up.weight": torch.zeros(2)}, "up.weight, no LoRA factor"),
    "ranks differ": ({f"{KEY}A.weight": torch.zeros(3, 64)}, r"A \[3, 64\] and B \[64, 4\]"),
    "a value is NaN": ({f"{KEY}A.weight": torch.full((4, 64), float("nan"))}, "holds NaN"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_adapter_is_refused(name: str, tmp_path: Path) -> None:
    tensors, reason = BROKEN[name]
    site = LowRank(Q, torch.randn(4, 64), torch.randn(64, 4), 1.0)
    peft_folder(tmp_path / "a", [site], tensors=tensors)
    pool = AdapterPool(llama().compiled, 1 << 20)
    with pytest.raises(AdapterError, match=reason):
        pool.add("a", tmp_path / "a", pin=True)
    assert len(pool) == 0 and pool.status().used_bytes == 0


@pytest.mark.parametrize("kind", ["lora", "packed-lora", "vera"])
def test_files_cut_short_are_refused(kind: str, tmp_path: Path) -> None:
    shutil.copytree(folder(kind), tmp_path / "a")
    file = next(tmp_path.glob("a/*.safetensors"))
    file.write_bytes(file.read_bytes()[:-8])
    pool = AdapterPool(llama().compiled, 1 << 20)
    with pytest.raises(AdapterError, match="damaged"):
        pool.add("a", tmp_path / "a", pin=True)
    assert len(pool) == 0
    next(tmp_path.glob("a/*.json")).write_text("{")
    with pytest.raises(AdapterError, match="cannot (be )?read"):
        pool.add("a", tmp_path / "a")


def test_a_bad_replacement_leaves_the_old_adapter(tmp_path: Path) -> None:
    tensors = BROKEN["a value is NaN"][0]
    site = LowRank(Q, torch.randn(4, 64), torch.randn(64, 4), 1.0)
    peft_folder(tmp_path / "a", [site], tensors=tensors)
    pool, ids = pool_of(llama().compiled, "lora"), ids_of(1)
    pool.pin("lora")
    with pytest.raises(AdapterError, match="holds NaN"):
        pool.add("lora", tmp_path / "a", replace=True)
    with pool.use("lora"):
        torch.testing.assert_close(run(pool.model, ids), run(alone("lora"), ids), **CLOSE)


@pytest.mark.parametrize("error", [RuntimeError, MemoryError, KeyboardInterrupt])
def test_whatever_goes_wrong_leaves_the_old_adapter_or_none(
    error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    pool, ids = pool_of(llama().compiled, "lora"), ids_of(1)

    def fails(*_: Any) -> None:
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(PackedFolder, "load", fails)
        for name in ("lora", "new"):
            with pytest.raises(error):
                pool.add(name, folder("packed-wide"), replace=True, pin=True)
    assert pool.names == ("lora",) and not pool.status().pinned
    with pool.use("lora"):
        torch.testing.assert_close(run(pool.model, ids), run(alone("lora"), ids), **CLOSE)


def test_of_two_adapters_added_at_once_under_one_name_one_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pool, ids = pool_of(llama().compiled), ids_of(1)
    both_read, facts, told = threading.Barrier(2), PackedFolder.facts, dict[str, str]()

    def waits(self: PackedFolder) -> Facts:
        found = facts(self)
        both_read.wait(30)
        return found

    monkeypatch.setattr(PackedFolder, "facts", waits)

    def add(kind: str) -> None:
        try:
            pool.add("a", folder(kind), pin=True)
        except AdapterError as error:
            told[kind] = str(error)

    kinds = ("packed-lora", "packed-wide")
    threads = [threading.Thread(target=add, args=(kind,)) for kind in kinds]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (refused,) = told
    assert "registered already" in told[refused]
    (kept,) = set(kinds) - {refused}
    with pool.use("a"):
        torch.testing.assert_close(run(pool.model, ids), run(alone(kept), ids), **CLOSE)


def test_an_adapter_is_checked_against_the_models_own_one_as_it_is_now(tmp_path: Path) -> None:
    model = own(low_llama().compiled)
    lowra.save_adapter(peft.get_peft_model(own(model), config()), tmp_path / "above")
    pool = AdapterPool(model, 1 << 20)
    pool.add("before", tmp_path / "above")
    lowra.save_adapter(model, tmp_path / "own")
    layer = next(layer for layer in quantized_linears(model).values() if layer.lora_B is not None)
    assert layer.lora_B is not None
    with torch.no_grad():
        layer.lora_B.add_(1.0)
    with pytest.raises(AdapterError, match="made for another compile"):
        pool.add("trained on", tmp_path / "above")
    lowra.load_adapter(model, tmp_path / "own")
    pool.add("again", tmp_path / "above")


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
