"""Checkpoint folders: equal outputs after a round trip, honest bits, and nothing half written."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import LlamaForCausalLM

import lowra
from lowra.compiler.errors import CheckpointError, OutputError
from lowra.compiler.storage import ROLES
from lowra.runtime.manifest import read_manifest
from lowra.runtime.module_view import quantized_linears
from lowra.runtime.modules import QuantizedEmbedding, QuantizedLinear
from tests import models
from tests.runtime.compiled_models import (
    EIGHT,
    SMALL,
    STACK,
    Case,
    compile_case,
    compiled_stack,
    half_llama,
    low_llama,
    one_layer_llama,
    output,
    remembered_capture,
    stack,
    stored_rows,
    tied_llama,
    tied_llama_with_head,
    wide_llama,
)


def tensors_of(folder: Path, pattern: str = "*.safetensors") -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob(pattern)):
        with safe_open(path, framework="pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return found


def bits_on_disk(folder: Path) -> int:
    """Stored bits of all sites, from the tensors of model*.safetensors and their names alone."""
    packed = {
        name: tensor
        for name, tensor in tensors_of(folder, "model*.safetensors").items()
        if name.rpartition(".")[2] in ROLES
    }
    return 8 * sum(t.numel() * t.element_size() for t in packed.values())


def hashes(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


# --- round trips --------------------------------------------------------------------------------


def test_a_plain_module_comes_back_equal_in_a_skeleton(stack_folder: Path) -> None:
    case = compiled_stack()
    loaded = lowra.load(stack_folder, case.skeleton)
    assert torch.equal(output(loaded, case.inputs), output(case.compiled, case.inputs))


def test_a_loaded_model_says_what_the_saved_one_said(llama_folder: Path) -> None:
    saved, loaded = (cast("Any", m).lowra for m in (low_llama().compiled, lowra.load(llama_folder)))
    assert loaded.fingerprint == saved.fingerprint
    assert loaded.recipe == saved.recipe
    report = {key: value for key, value in saved.report.items() if key != "seconds"}
    assert loaded.report == json.loads(json.dumps(report))
    assert loaded.plan == json.loads(json.dumps(saved.plan))
    assert [s.name for s in loaded.sites] == sorted(s.name for s in saved.sites)
    assert loaded.program is None and loaded.graph is None and loaded.text() == ""


def test_a_loaded_model_trains_its_factors_only_and_is_in_eval_mode(llama_folder: Path) -> None:
    loaded = cast("Any", lowra.load(llama_folder))
    assert not loaded.training
    trainable = {name for name, p in loaded.named_parameters() if p.requires_grad}
    saved = low_llama().compiled
    assert trainable == {name for name, p in saved.named_parameters() if p.requires_grad}
    loaded(**low_llama().inputs, labels=low_llama().inputs["input_ids"]).loss.backward()
    assert all(p.grad is not None for p in loaded.parameters() if p.requires_grad)


def test_trained_factors_are_what_is_saved(tmp_path: Path, stack_folder: Path) -> None:
    case = compiled_stack()
    model = lowra.load(stack_folder, stack())
    with torch.no_grad():
        for layer in quantized_linears(model).values():
            cast("torch.Tensor", layer.lora_A).mul_(2)
    again = lowra.load(lowra.save(model, tmp_path / "trained"), stack())
    assert torch.equal(output(again, case.inputs), output(model, case.inputs))
    assert not torch.equal(output(again, case.inputs), output(case.compiled, case.inputs))


def test_saving_a_loaded_model_again_writes_the_same_tensors(
    tmp_path: Path, llama_folder: Path
) -> None:
    again = lowra.save(lowra.load(llama_folder), tmp_path / "again")
    first, second = hashes(llama_folder), hashes(again)
    assert set(first) == set(second)
    changed = {name for name in first if first[name] != second[name]}
    assert changed <= {"config.json"}


def test_a_checkpoint_is_a_hugging_face_folder(llama_folder: Path) -> None:
    assert {path.name for path in llama_folder.iterdir()} == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "config.json",
        "generation_config.json",
        "lowra.json",
        "model.safetensors",
    }
    config = json.loads((llama_folder / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["quantization_config"] == {
        "quant_method": "lowra",
        "format_version": 3,
        "bit_budget": 3,
    }
    manifest = read_manifest(llama_folder)
    assert manifest["format_version"] == 3
    assert set(manifest["checksums"]) == set(tensors_of(llama_folder))


def test_factors_are_in_the_adapter_file_and_nowhere_else(llama_folder: Path) -> None:
    base = tensors_of(llama_folder, "model*.safetensors")
    assert not [name for name in base if "lora" in name]
    assert all("lora" in name for name in tensors_of(llama_folder, "adapter*.safetensors"))


def test_every_stored_tensor_has_a_plain_dtype(llama_folder: Path) -> None:
    plain = {torch.float32, torch.float16, torch.bfloat16, torch.int32, torch.uint8}
    assert {t.dtype for t in tensors_of(llama_folder).values()} <= plain


def test_a_model_without_an_adapter_saves_none_and_loads(tmp_path: Path) -> None:
    case = compile_case(stack, bit_budget=6, rank=0)
    folder = lowra.save(case.compiled, tmp_path / "bare")
    assert not list(folder.glob("adapter*"))
    loaded = lowra.load(folder, stack())
    assert torch.equal(output(loaded, case.inputs), output(case.compiled, case.inputs))


def test_a_bfloat16_model_comes_back_equal(tmp_path: Path) -> None:
    case = half_llama()
    loaded = lowra.load(lowra.save(case.compiled, tmp_path / "half"))
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    assert torch.equal(output(loaded, case.inputs), output(case.compiled, case.inputs))


def test_a_model_loaded_in_bfloat16_by_transformers_comes_back_equal(tmp_path: Path) -> None:
    """from_pretrained leaves the rotary frequencies in float32; so must load."""
    models.tiny_llama(layers=1).save_pretrained(tmp_path / "dense")
    dense = LlamaForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.bfloat16)
    compiled = lowra.compile(dense, **EIGHT)
    loaded = lowra.load(lowra.save(compiled, tmp_path / "half"))
    frequencies = [m.model.rotary_emb.inv_freq for m in (compiled, cast("Any", loaded))]
    assert torch.equal(frequencies[0], frequencies[1])
    inputs = models.tokens(dense)
    assert torch.equal(output(loaded, inputs), output(compiled, inputs))


# --- tied weights -------------------------------------------------------------------------------


def test_a_tied_head_is_stored_once_and_comes_back_tied(tmp_path: Path) -> None:
    case = tied_llama()
    folder = lowra.save(case.compiled, tmp_path / "tied")
    dense = [n for n in tensors_of(folder) if n in ("lm_head.weight", "model.embed_tokens.weight")]
    assert len(dense) == 1
    loaded = cast("Any", lowra.load(folder))
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert torch.equal(output(loaded, case.inputs), output(case.compiled, case.inputs))


def test_an_included_tied_head_comes_back_quantized_with_its_embedding(tmp_path: Path) -> None:
    case = tied_llama_with_head()
    folder = lowra.save(case.compiled, tmp_path / "tied")
    assert sum(name.endswith("codes") for name in tensors_of(folder)) == 8
    loaded = cast("Any", lowra.load(folder))
    assert type(loaded.lm_head) is QuantizedLinear
    assert type(loaded.model.embed_tokens) is QuantizedEmbedding
    assert loaded.lm_head.codes is loaded.model.embed_tokens.codes
    assert torch.equal(output(loaded, case.inputs), output(case.compiled, case.inputs))


def test_the_bits_of_a_compressed_tied_head_are_those_of_the_report(tmp_path: Path) -> None:
    case = tied_llama_with_head()
    folder = lowra.save(case.compiled, tmp_path / "tied")
    assert bits_on_disk(folder) == 8 * cast("Any", case.compiled).lowra.report["totals"]["bytes"]


class Twins(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(32, 32), nn.Linear(32, 32)
        self.two.weight = self.one.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.two(torch.relu(self.one(x)))


def test_two_linears_on_one_weight_come_back_equal(tmp_path: Path) -> None:
    case = compile_case(Twins, bit_budget=20, widths=(8,), rank=2)
    folder = lowra.save(case.compiled, tmp_path / "twins")
    loaded = cast("Any", lowra.load(folder, Twins()))
    assert torch.equal(output(loaded, case.inputs), output(case.compiled, case.inputs))
    assert loaded.one.lora_A is loaded.two.lora_A


# --- bits ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [1.5, 2.0, 3.0])
def test_the_bits_on_disk_are_those_of_the_report_and_within_the_budget(
    tmp_path: Path, budget: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lowra.api.capture", remembered_capture)
    compiled = lowra.compile(wide_llama(), bit_budget=budget, **SMALL)
    totals = compiled.lowra.report["totals"]
    bits = bits_on_disk(lowra.save(compiled, tmp_path / "wide"))
    assert bits == 8 * totals["bytes"]
    assert bits / totals["weights"] == totals["stored_bits"]
    assert bits <= budget * totals["weights"]
    assert totals["stored_bits"] > budget - 0.1, "the budget was not used"
    assert len(stored_rows(compiled)) > 1


def test_the_bits_of_every_site_on_disk_are_those_of_the_report(llama_folder: Path) -> None:
    stored = tensors_of(llama_folder, "model*.safetensors")
    for site in read_manifest(llama_folder)["report"]["sites"]:
        names = [f"{site['name']}.{role}" for role in ROLES]
        mine = [stored[name] for name in names if name in stored]
        assert site["bytes"] == sum(t.numel() * t.element_size() for t in mine)


# --- the same bytes -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def twice(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two compiles of two builds of the same model, saved."""
    folder = tmp_path_factory.mktemp("twice")
    again = lowra.compile(one_layer_llama(), bit_budget=3, **SMALL)
    return lowra.save(low_llama().compiled, folder / "one"), lowra.save(again, folder / "two")


def test_two_compiles_write_byte_identical_files(twice: tuple[Path, Path]) -> None:
    first, second = map(hashes, twice)
    assert first == second


def test_no_wall_time_enters_the_manifest(llama_folder: Path) -> None:
    assert "seconds" not in read_manifest(llama_folder)["report"]


def test_another_seed_writes_other_bytes(tmp_path: Path) -> None:
    """The seed draws the signs of rotations."""
    written = [
        hashes(lowra.save(compile_case(stack, **options).compiled, tmp_path / str(seed)))
        for seed in (0, 1)
        if (options := {**STACK, "seed": seed, "rotation": True})
    ]
    assert written[0]["model.safetensors"] != written[1]["model.safetensors"]


# --- adapter files ------------------------------------------------------------------------------


def assert_peft_files(case: Case, folder: Path) -> dict[str, Any]:
    """The adapter config, after checking that PEFT would compute what the layers compute."""
    config = json.loads((folder / "adapter_config.json").read_text())
    layers = quantized_linears(case.compiled)
    assert config["peft_type"] == "LORA"
    assert config["bias"] == "none"
    assert config["target_modules"] == sorted(layers)
    stored = tensors_of(folder, "adapter_model.safetensors")
    prefix = "base_model.model."
    assert set(stored) == {
        f"{prefix}{name}.{role}.weight" for name in layers for role in ("lora_A", "lora_B")
    }
    for name, layer in layers.items():
        rank = config["rank_pattern"].get(name, config["r"])
        alpha = config["alpha_pattern"].get(name, config["lora_alpha"])
        assert stored[f"{prefix}{name}.lora_A.weight"].shape == (rank, layer.k)
        assert stored[f"{prefix}{name}.lora_B.weight"].shape == (layer.n, rank)
        assert alpha / rank == pytest.approx(layer.scaling)
    return config


def test_adapter_files_have_the_names_shapes_and_scaling_of_peft(llama_folder: Path) -> None:
    config = assert_peft_files(low_llama(), llama_folder)
    assert (config["r"], config["lora_alpha"], config["rank_pattern"]) == (4, 4.0, {})


def test_ranks_that_a_small_layer_cuts_are_in_the_patterns(tmp_path: Path) -> None:
    case = compile_case(stack, bit_budget=6, rank=48, alpha=24)
    config = assert_peft_files(case, lowra.save(case.compiled, tmp_path / "ranks"))
    assert config["r"] == 48
    assert config["lora_alpha"] == 24
    assert config["rank_pattern"] == {"last": 32}


# --- where it may be written --------------------------------------------------------------------


def test_a_dense_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"not compiled by lowra; call lowra\.compile"):
        lowra.save(stack(), tmp_path / "dense")
    assert not list(tmp_path.iterdir())


def test_an_output_folder_that_is_not_empty_is_refused_and_kept(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(OutputError, match="exists and is not empty"):
        lowra.save(compiled_stack().compiled, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_an_empty_output_folder_is_used(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert lowra.save(compiled_stack().compiled, tmp_path / "out") == tmp_path / "out"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_overwrite_replaces_the_whole_folder(tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "stale.safetensors").write_text("old")
    lowra.save(compiled_stack().compiled, target, overwrite=True)
    assert not (target / "stale.safetensors").exists()
    lowra.load(target, stack())


def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(OutputError, match="is a file; name a folder"):
        lowra.save(compiled_stack().compiled, tmp_path / "out", overwrite=True)
    assert (tmp_path / "out").read_text() == "mine"


def test_missing_parents_are_made(tmp_path: Path) -> None:
    assert (lowra.save(compiled_stack().compiled, tmp_path / "a" / "b") / "lowra.json").is_file()


def test_a_parent_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot write to"):
        lowra.save(compiled_stack().compiled, tmp_path / "file" / "out")


def test_a_read_only_parent_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused by a stand-in for the system call: root may write where it likes."""

    def denied(*_args: Any, **_kwargs: Any) -> str:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.mkdtemp", denied)
    with pytest.raises(OutputError, match="cannot write to .*Permission denied"):
        lowra.save(compiled_stack().compiled, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def full_disk(*_args: Any, **_kwargs: Any) -> None:
    raise OSError(28, "No space left on device")


def full_disk_in_safetensors(*_args: Any, **_kwargs: Any) -> None:
    raise SafetensorError("Error while serializing: I/O error: No space left on device (28)")


@pytest.mark.parametrize(
    ("what", "failure"),
    [
        ("safetensors.torch.save_file", full_disk),
        ("safetensors.torch.save_file", full_disk_in_safetensors),
        ("lowra.runtime.checkpoint_writer._write_json", full_disk),
        ("pathlib.Path.rename", full_disk),
    ],
    ids=["tensors", "tensors-in-rust", "manifest", "rename"],
)
def test_a_full_disk_is_said_and_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str, failure: Callable[..., None]
) -> None:
    monkeypatch.setattr(what, failure)
    with pytest.raises(OutputError, match="the disk is full; nothing was left behind"):
        lowra.save(compiled_stack().compiled, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_full_disk_keeps_the_folder_that_was_to_be_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = lowra.save(compiled_stack().compiled, tmp_path / "out")
    before = hashes(target)
    monkeypatch.setattr("lowra.runtime.checkpoint_writer._write_json", full_disk)
    with pytest.raises(OutputError):
        lowra.save(compiled_stack().compiled, target, overwrite=True)
    assert hashes(target) == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_interrupted_save_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_args: Any, **_kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("lowra.runtime.checkpoint_writer._write_json", interrupted)
    with pytest.raises(KeyboardInterrupt):
        lowra.save(compiled_stack().compiled, tmp_path / "out")
    assert not list(tmp_path.iterdir())
