"""Adapters from PEFT's folders to packed ones and back: bits on disk, damage, refusals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import lowra
from lowra.adapters.factors import LowRank
from lowra.compiler.errors import AdapterError, BudgetError, OutputError, RecipeError
from lowra.runtime.manifest import manifest_checksum
from lowra.runtime.packed_adapter_files import MANIFEST, WEIGHTS, read_packed
from lowra.workflows.describe_adapter import describe_adapter
from tests.adapters.adapters import low_rank, peft_folder

METHODS = [{"bit_budget": 1.6}, {"bits": 2, "rho": 0.8}, {"bits": 3, "rho": 0.9, "clip": "ste"}]
UP = "base_model.model.layers.0.up"


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("method", METHODS)
def test_stored_bits_are_those_of_the_file(tmp_path: Path, method) -> None:
    done = lowra.compress_adapter(peft_folder(tmp_path / "in"), tmp_path / "out", **method)
    tensors = load_file(tmp_path / "out" / WEIGHTS)
    size = sum(t.numel() * t.element_size() for t in tensors.values())
    assert done.parameters == 2 * 8 * (96 + 160)
    assert done.stored_bits == 8 * size / done.parameters
    assert done.file_bytes == sum(len(data) for data in files(tmp_path / "out").values())
    assert done.plain_bytes == 4 * done.parameters
    if "bit_budget" in method:
        assert done.stored_bits <= method["bit_budget"]


@pytest.mark.parametrize("method", METHODS)
def test_two_runs_give_the_same_bytes(tmp_path: Path, method) -> None:
    source = peft_folder(tmp_path / "in")
    for name in ("one", "two"):
        lowra.compress_adapter(source, tmp_path / name, **method)
    assert files(tmp_path / "one") == files(tmp_path / "two")


@pytest.mark.parametrize("method", METHODS)
def test_a_packed_adapter_comes_back_and_leaves_as_plain_peft(tmp_path: Path, method) -> None:
    source = peft_folder(tmp_path / "in")
    done = lowra.compress_adapter(source, tmp_path / "out", **method)
    content = read_packed(tmp_path / "out")
    plain = load_file(
        lowra.export_adapter(tmp_path / "out", tmp_path / "plain") / "adapter_model.safetensors"
    )
    before = load_file(source / "adapter_model.safetensors")
    assert {k: t.shape for k, t in plain.items()} == {k: t.shape for k, t in before.items()}
    lost, whole = 0.0, 0.0
    for site in content.adapter.sites:
        a, b = site.dense()
        prefix = f"base_model.model.{site.name}"
        assert torch.equal(plain[f"{prefix}.lora_A.weight"], a)
        assert torch.equal(plain[f"{prefix}.lora_B.weight"], b)
        dense = before[f"{prefix}.lora_B.weight"] @ before[f"{prefix}.lora_A.weight"]
        error = float((dense - b @ a).square().sum())
        assert content.errors[site.name] == pytest.approx(
            error / float(dense.square().sum()), rel=1e-3
        )
        lost, whole = lost + error, whole + float(dense.square().sum())
    assert done.error == pytest.approx(lost / whole, rel=1e-3)
    config = json.loads((tmp_path / "plain" / "adapter_config.json").read_text())
    assert config == json.loads((source / "adapter_config.json").read_text())


def test_peft_loads_what_is_exported(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    from tests.models import tiny_llama

    adapted = peft.get_peft_model(
        tiny_llama(),
        peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", use_rslora=True),
    )
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.02)
    adapted.save_pretrained(tmp_path / "in")
    lowra.compress_adapter(tmp_path / "in", tmp_path / "out", bit_budget=3.0)
    lowra.export_adapter(tmp_path / "out", tmp_path / "plain")
    again = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path / "plain")
    site = read_packed(tmp_path / "out").adapter.sites[0]
    layer = again.get_submodule(f"base_model.model.{site.name}")
    assert layer.scaling["default"] == site.scaling
    a, b = site.dense()
    torch.testing.assert_close(layer.get_delta_weight("default"), site.scaling * b @ a)


def test_ranks_above_the_sites_sizes_come_back_whole(tmp_path: Path) -> None:
    wide = LowRank("head", torch.randn(8, 96), torch.randn(3, 8), 2.0)
    lowra.compress_adapter(peft_folder(tmp_path / "in", [wide]), tmp_path / "out", bit_budget=3)
    (site,) = read_packed(tmp_path / "out").adapter.sites
    assert site.a.rank == 3 and site.rank == 8
    assert lowra.export_adapter(tmp_path / "out", tmp_path / "plain")


def test_half_precision_factors_and_a_site_of_zeros_are_taken(tmp_path: Path) -> None:
    zero = LowRank("b", torch.randn(8, 64).half(), torch.zeros(32, 8).half(), 2.0)
    half = low_rank(name="a")
    half = LowRank("a", half.a.bfloat16(), half.b.bfloat16(), 2.0)
    done = lowra.compress_adapter(peft_folder(tmp_path / "in", [half, zero]), tmp_path / "out")
    rows = {row["name"]: row for row in done.sites}
    assert rows["b"]["error"] == 0 and done.plain_bytes == 2 * done.parameters
    assert not read_packed(tmp_path / "out").adapter.sites[1].dense()[1].any()


@pytest.mark.parametrize(
    ("tensors", "config", "words"),
    [
        ({f"{UP}.lora_A.weight": None}, {}, "lacks lora_A of layers.0.up"),
        ({f"{UP}.lora_B.weight": None}, {}, "lacks lora_B of layers.0.up"),
        ({f"{UP}.lora_C.weight": torch.ones(2)}, {}, "holds .*lora_C.weight"),
        ({f"{UP}.lora_A.weight": torch.ones(7, 160)}, {}, "layers.0.up has A .7, 160."),
        ({f"{UP}.lora_A.weight": torch.full((8, 160), torch.nan)}, {}, "NaN"),
        ({}, {"r": 4}, "rank 4"),
        ({}, {"use_dora": True}, "DoRA"),
        ({}, {"peft_type": "IA3"}, "IA3"),
        ({}, {"lora_alpha": float("inf")}, "lora_alpha"),
    ],
)
def test_a_broken_adapter_is_refused_and_nothing_is_written(tmp_path, tensors, config, words):
    source = peft_folder(tmp_path / "in", tensors=tensors, config=config)
    with pytest.raises(AdapterError, match=words):
        lowra.compress_adapter(source, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in"]


ONE = torch.eye(1, 160)
NOTHING: dict[str, tuple[torch.Tensor, torch.Tensor, dict[str, float]]] = {
    "B is zero": (ONE, torch.zeros(96, 1), {}),
    "directions cancel": (ONE.expand(2, -1), torch.tensor([[1.0, -1.0]]), {}),
    "values vanish": (1e-30 * ONE, torch.full((96, 1), 1e-30), {}),
    "the scaling is zero": (ONE, torch.ones(96, 1), {"lora_alpha": 0}),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("case", NOTHING)
def test_an_adapter_that_changes_nothing_is_refused(tmp_path: Path, case: str, method) -> None:
    a, b, config = NOTHING[case]
    source = peft_folder(tmp_path / "in", [LowRank("up", a, b, 1.0)], config=config)
    with pytest.raises(AdapterError, match="scaling B A is zero at every site"):
        lowra.compress_adapter(source, tmp_path / "out", **method)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in"]


def test_wrong_wishes_are_refused(tmp_path: Path) -> None:
    source = peft_folder(tmp_path / "in")
    for wishes, error in (
        ({"bit_budget": 0.9}, BudgetError), ({"bits": 2, "bit_budget": 2.0}, RecipeError),
        ({"bits": 2, "rho": 0.0}, RecipeError), ({"bits": 1}, RecipeError),
        ({"group": 0}, RecipeError),
    ):  # fmt: skip
        with pytest.raises(error):
            lowra.compress_adapter(source, tmp_path / "out", **wishes)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    with pytest.raises(OutputError):
        lowra.compress_adapter(source, tmp_path / "out")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["mine"]


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    lowra.compress_adapter(peft_folder(tmp_path / "in"), tmp_path / "out", bits=2)
    return tmp_path / "out"


@pytest.mark.parametrize("name", [WEIGHTS, MANIFEST])
def test_files_cut_short_at_any_place_are_refused(packed: Path, name: str) -> None:
    data = (packed / name).read_bytes()
    for size in (0, 5, len(data) // 3, len(data) // 2, len(data) - 1):
        (packed / name).write_bytes(data[:size])
        if name == MANIFEST and size == len(data) - 1:  # the last byte is a line's end
            read_packed(packed)
            continue
        with pytest.raises(AdapterError):
            read_packed(packed)
    (packed / name).unlink()
    with pytest.raises(AdapterError, match=name):
        read_packed(packed)


def test_every_flipped_bit_of_the_tensors_is_found(packed: Path) -> None:
    file = packed / WEIGHTS
    data = file.read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    for place in range(header, len(data), max(len(data) // 40, 1)):
        file.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        with pytest.raises(AdapterError):
            read_packed(packed)


@pytest.mark.parametrize(
    "edit",
    [
        {"n": 128}, {"k": "160"}, {"n": -96}, {"a": "8x2"}, {"a": "8x7"}, {"b": ""}, {"rank": 1},
        {"scaling": "two"}, {"a": None}, {"n": 10**12},
    ],
)  # fmt: skip
def test_a_manifest_that_lies_is_refused_even_when_sealed_anew(packed: Path, edit) -> None:
    file = packed / MANIFEST
    manifest = json.loads(file.read_text())
    manifest["sites"]["layers.0.up"] |= edit
    file.write_text(json.dumps(manifest))
    with pytest.raises(AdapterError, match="damaged or edited"):
        read_packed(packed)
    manifest["checksum"] = manifest_checksum(manifest)
    file.write_text(json.dumps(manifest))
    with pytest.raises(AdapterError):
        read_packed(packed)


def test_another_version_is_refused_with_its_number(packed: Path) -> None:
    manifest = json.loads((packed / MANIFEST).read_text()) | {"format_version": 9}
    (packed / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(AdapterError, match="format version 9; this lowra reads 1"):
        read_packed(packed)


def test_both_kinds_of_folder_can_be_described(packed: Path, tmp_path: Path) -> None:
    about, plain = describe_adapter(packed), describe_adapter(tmp_path / "in")
    assert about["kind"] == "packed" and plain["kind"] == "plain"
    assert about["parameters"] == plain["parameters"] and plain["stored_bits"] == 32
    assert [s["name"] for s in about["sites"]] == ["layers.0.down", "layers.0.up"]
    assert plain["sites"][0]["directions_80"] <= plain["sites"][0]["directions_90"]
