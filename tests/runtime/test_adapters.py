"""Adapter folders in and out of compiled models, and every way in which one can be wrong."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lowra
from lowra.compiler.errors import AdapterError, OutputError
from lowra.runtime.adapter_files import BASE_KEY, MODEL_KEY, read_adapter
from lowra.runtime.module_view import quantized_linears
from tests.runtime.compiled_models import (
    EIGHT,
    STACK,
    compile_case,
    compiled_stack,
    low_llama,
    one_layer_llama,
    output,
    stack,
)

FIRST = "base_model.model.first"


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The adapter of `compiled_stack`; read it only."""
    folder = tmp_path_factory.mktemp("adapters") / "stack"
    return lowra.save_adapter(compiled_stack().compiled, folder)


@pytest.fixture
def own(written: Path, copied: Callable[[Path], Path]) -> Path:
    """A copy to damage."""
    return copied(written)


def edit_config(folder: Path, **fields: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def edit_tensors(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def target() -> Any:
    return copy.deepcopy(compiled_stack().compiled)


def refused(folder: Path, said: str, **options: Any) -> None:
    """Loading raises AdapterError and leaves the model as it was."""
    model = target()
    with pytest.raises(AdapterError, match=said):
        lowra.load_adapter(model, folder, **options)
    assert torch.equal(output(model, compiled_stack().inputs), untouched())


def untouched() -> Tensor:
    return output(compiled_stack().compiled, compiled_stack().inputs)


def zeroed() -> Any:
    """The model with another adapter than its own."""
    model = target()
    for layer in quantized_linears(model).values():
        layer.set_adapter(torch.zeros(2, layer.k), torch.zeros(layer.n, 2), 3.0)
    return model


# --- round trips ----------------------------------------------------------------------------------


def test_an_adapter_comes_back_bit_for_bit(written: Path) -> None:
    model = zeroed()
    assert not torch.equal(output(model, compiled_stack().inputs), untouched())
    assert lowra.load_adapter(model, written) is model
    assert torch.equal(output(model, compiled_stack().inputs), untouched())
    for name, layer in quantized_linears(compiled_stack().compiled).items():
        back = model.get_submodule(name)
        assert torch.equal(back.lora_A, layer.lora_A) and torch.equal(back.lora_B, layer.lora_B)
        assert back.scaling == layer.scaling
        assert back.lora_A.requires_grad and back.lora_B.requires_grad


def test_equal_adapters_are_equal_bytes(written: Path, tmp_path: Path) -> None:
    again = lowra.save_adapter(compiled_stack().compiled, tmp_path / "again")
    assert sorted(f.name for f in again.iterdir()) == sorted(f.name for f in written.iterdir())
    for file in again.iterdir():
        assert file.read_bytes() == (written / file.name).read_bytes()


def test_factors_in_float32_on_a_layer_in_bfloat16_keep_their_bits(tmp_path: Path) -> None:
    case = compile_case(lambda: one_layer_llama().to(torch.bfloat16), **EIGHT)
    layers = quantized_linears(case.compiled)
    for layer in layers.values():
        layer.set_adapter(torch.randn(2, layer.k), torch.randn(layer.n, 2), 0.25)
    expected = output(case.compiled, case.inputs)
    folder = lowra.save_adapter(case.compiled, tmp_path / "adapter")
    whole = lowra.load(lowra.save(case.compiled, tmp_path / "checkpoint"))
    for model in (lowra.load_adapter(copy.deepcopy(case.compiled), folder), whole):
        assert torch.equal(output(model, case.inputs), expected)
        for name, layer in layers.items():
            back = quantized_linears(model)[name]
            assert back.lora_B is not None and back.lora_B.dtype == torch.float32
            assert torch.equal(back.lora_B, layer.lora_B)  # pyright: ignore


def test_an_adapter_fits_the_checkpoint_that_its_model_was_saved_as(
    written: Path, stack_folder: Path
) -> None:
    """Packed tensors read from a file have the fingerprint that they had in the first process."""
    loaded = lowra.load(stack_folder, stack())
    lowra.load_adapter(loaded, written)
    assert torch.equal(output(loaded, compiled_stack().inputs), untouched())


def test_session_and_graph_follow_an_adapter_of_another_rank(tmp_path: Path) -> None:
    case = low_llama()
    model = copy.deepcopy(case.compiled)
    for layer in quantized_linears(model).values():
        layer.set_adapter(torch.randn(2, layer.k), torch.randn(layer.n, 2), 0.5)
    folder = lowra.save_adapter(model, tmp_path / "adapter")
    loaded = lowra.load_adapter(copy.deepcopy(case.compiled), folder)
    found = lowra.Session(loaded)(**case.inputs)
    torch.testing.assert_close(found, output(model, case.inputs), rtol=1e-4, atol=1e-4)


def test_the_report_says_what_adapter_the_model_has_now(tmp_path: Path) -> None:
    model = target()
    layers = quantized_linears(model)
    first = layers.pop("first")
    first.set_adapter(torch.randn(3, first.k), torch.randn(first.n, 3), 1.0)
    for layer in layers.values():
        layer.drop_adapter()
    loaded = lowra.load_adapter(target(), lowra.save_adapter(model, tmp_path / "adapter"))
    report = loaded.lowra.report
    assert {s["name"]: s["rank"] for s in report["sites"]} == {"first": 3, "middle": 0, "last": 0}
    weights = sum(site.weights for site in loaded.lowra.sites)
    assert report["totals"]["adapter_bits"] == 16 * 3 * (first.n + first.k) / weights
    assert compiled_stack().compiled.lowra.report["totals"]["adapter_bits"] != 0  # pyright: ignore


def test_on_top_two_adapters_are_one_of_the_joint_rank(own: Path) -> None:
    """Without the header it is an adapter of nobody's base, as PEFT writes them."""
    edit_tensors(own, lambda tensors: None)
    model = lowra.load_adapter(target(), own, on_top=True)
    for name, layer in quantized_linears(compiled_stack().compiled).items():
        both, x = quantized_linears(model)[name], torch.randn(2, layer.k)
        assert both.rank == 2 * layer.rank
        with torch.no_grad():
            twice = 2 * layer(x) - torch.nn.functional.linear(x, layer.weight, layer.bias)
            torch.testing.assert_close(both(x), twice, rtol=1e-4, atol=1e-4)


# --- where it belongs -----------------------------------------------------------------------------


def test_an_adapter_of_another_compile_is_refused_unless_told(written: Path) -> None:
    other = compile_case(stack, **{**STACK, "bit_budget": 4.5}).compiled
    before = output(other, compiled_stack().inputs)
    with pytest.raises(AdapterError, match="another compile of this model"):
        lowra.load_adapter(other, written)
    assert torch.equal(output(other, compiled_stack().inputs), before)
    lowra.load_adapter(other, written, check_base=False)
    assert not torch.equal(output(other, compiled_stack().inputs), before)


def test_an_adapter_of_another_model_is_refused(written: Path) -> None:
    def other() -> nn.Module:
        model = stack()
        with torch.no_grad():
            model.first.weight.mul_(1.5)
        return model

    model = compile_case(other, **STACK).compiled
    with pytest.raises(AdapterError, match="another model .*fingerprint"):
        lowra.load_adapter(model, written)


def test_the_header_names_the_base(written: Path) -> None:
    found = read_adapter(written)
    assert found.base is not None
    assert found.base.model == compiled_stack().compiled.lowra.fingerprint  # pyright: ignore
    raw = (written / "adapter_model.safetensors").read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])["__metadata__"]
    assert list(header) == ["format", MODEL_KEY, BASE_KEY]


# --- bad input ------------------------------------------------------------------------------------


def test_a_wrong_rank_is_refused(own: Path) -> None:
    edit_config(own, r=8)
    refused(own, r"rank 8, so A \[8, k\]")


def test_factors_of_two_ranks_are_refused(own: Path) -> None:
    def cut(tensors: dict[str, Tensor]) -> None:
        tensors[f"{FIRST}.lora_B.weight"] = tensors[f"{FIRST}.lora_B.weight"][:, :2].contiguous()

    edit_tensors(own, cut)
    refused(own, r"first has A \[4, 64\] and B \[64, 2\]")


@pytest.mark.parametrize(("role", "axis"), [("lora_A", 1), ("lora_B", 0)])
def test_a_wrong_shape_is_refused(own: Path, role: str, axis: int) -> None:
    def cut(tensors: dict[str, Tensor]) -> None:
        key = f"{FIRST}.{role}.weight"
        tensors[key] = tensors[key].narrow(axis, 0, 32).contiguous()

    edit_tensors(own, cut)
    refused(own, r"this model needs A \[r, 64\] and B \[64, r\]")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_factors_that_are_not_finite_are_refused(own: Path, value: float) -> None:
    edit_tensors(own, lambda tensors: tensors[f"{FIRST}.lora_B.weight"][0].fill_(value))
    refused(own, "lora_B of first holds NaN or infinity")


def test_an_integer_factor_is_refused(own: Path) -> None:
    key = f"{FIRST}.lora_B.weight"
    edit_tensors(own, lambda tensors: tensors.update({key: tensors[key].int()}))
    refused(own, "lora_B of first is torch.int32")


@pytest.mark.parametrize("role", ["lora_A", "lora_B"])
def test_a_missing_factor_is_refused(own: Path, role: str) -> None:
    edit_tensors(own, lambda tensors: tensors.pop(f"{FIRST}.{role}.weight"))
    refused(own, f"lacks {role} of first")


def test_missing_factors_of_a_target_are_refused(own: Path) -> None:
    def drop(tensors: dict[str, Tensor]) -> None:
        for role in ("lora_A", "lora_B"):
            del tensors[f"{FIRST}.{role}.weight"]

    edit_tensors(own, drop)
    refused(own, "lacks the factors of first")
    edit_config(own, target_modules="first|middle|last")
    refused(own, "lacks the factors of first, which its config targets")
    edit_config(own, target_modules=["middle", "last"])
    assert quantized_linears(lowra.load_adapter(target(), own))["first"].rank == 0


def test_a_target_that_is_not_compressed_here_is_sent_to_peft(own: Path) -> None:
    def rename(tensors: dict[str, Tensor]) -> None:
        for role in ("lora_A", "lora_B"):
            tensors[f"base_model.model.norm.{role}.weight"] = tensors.pop(f"{FIRST}.{role}.weight")

    edit_tensors(own, rename)
    edit_config(own, target_modules=["norm", "middle", "last"])
    refused(own, "adapts norm, which is not compressed .*PeftModel.from_pretrained")


def test_an_unknown_target_is_refused_with_the_nearest(own: Path) -> None:
    def rename(tensors: dict[str, Tensor]) -> None:
        for role in ("lora_A", "lora_B"):
            tensors[f"base_model.model.midle.{role}.weight"] = tensors.pop(f"{FIRST}.{role}.weight")

    edit_tensors(own, rename)
    edit_config(own, target_modules=["midle", "middle", "last"])
    refused(own, "adapts midle, which this model does not have; nearest: middle")


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"peft_type": "IA3"}, "of type 'IA3', not LORA"),
        ({"peft_type": None}, "of type None"),
        ({"modules_to_save": ["norm"]}, r"modules_to_save=\['norm'\]"),
        ({"use_dora": True}, "use_dora"),
        ({"lora_bias": True}, "lora_bias"),
        ({"init_lora_weights": "loftq"}, "check_base=False"),
        ({"lora_alpha": "16"}, "lora_alpha for first is '16'"),
        ({"lora_alpha": float("nan")}, "lora_alpha for first is nan"),
        ({"r": 0}, "rank for first is 0"),
        ({"rank_pattern": ["first"]}, "rank_pattern is .* no object"),
        ({"rank_pattern": {"(first": 4}}, r"'\(first' is no regular expression"),
    ],
)
def test_a_config_that_cannot_be_followed_is_refused(
    own: Path, fields: dict[str, Any], said: str
) -> None:
    edit_config(own, **fields)
    refused(own, said)


def test_a_damaged_or_missing_file_is_refused(own: Path, tmp_path: Path) -> None:
    (own / "adapter_model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0nonsense")
    refused(own, "is damaged")
    (own / "adapter_model.safetensors").unlink()
    refused(own, "holds no weights")
    (own / "adapter_model.bin").write_bytes(b"\x80\x04.")
    refused(own, "pickled adapter_model.bin, which can run code")
    (own / "adapter_config.json").write_text("[1]")
    refused(own, "no JSON object")
    (own / "adapter_config.json").write_text("{")
    refused(own, "cannot read")
    (own / "adapter_config.json").unlink()
    refused(own, "holds no adapter_config.json")
    refused(tmp_path / "nowhere", "no adapter at")


def test_an_adapter_without_factors_is_refused(own: Path) -> None:
    edit_tensors(own, lambda tensors: tensors.clear())
    refused(own, "no factors at all")


def test_a_failed_download_names_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: object, **__: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    with pytest.raises(AdapterError, match="cannot fetch 'who/what' .*no route to host"):
        lowra.load_adapter(target(), "who/what")


def test_a_dense_model_has_no_adapter_to_save_or_to_load(written: Path, tmp_path: Path) -> None:
    for action in (
        lambda: lowra.save_adapter(stack(), tmp_path / "adapter"),
        lambda: lowra.load_adapter(stack(), written),
    ):
        with pytest.raises(AdapterError, match="not compiled by lowra"):
            action()


def test_a_model_without_an_adapter_writes_none(tmp_path: Path) -> None:
    model = target()
    for layer in quantized_linears(model).values():
        layer.drop_adapter()
    with pytest.raises(AdapterError, match="has no adapter"):
        lowra.save_adapter(model, tmp_path / "adapter")
    assert not list(tmp_path.iterdir())


def test_norms_that_trained_beside_an_adapter_are_missed_aloud(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = target()
    lowra.prepare_training(model)
    lowra.save_adapter(model, tmp_path / "alone")
    assert not caplog.records
    lowra.prepare_training(model, ("adapters", "norms"))
    lowra.save_adapter(model, tmp_path / "beside")
    assert "norm trained beside this adapter and is no part of it" in caplog.text
    assert "lowra.save writes the whole model" in caplog.text


def test_norms_that_trained_before_their_model_was_saved_are_missed_too(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = target()
    lowra.prepare_training(model, ("adapters", "norms"))
    lowra.save(model, tmp_path / "whole")
    loaded = lowra.load(tmp_path / "whole", model=stack())
    lowra.save_adapter(loaded, tmp_path / "alone")
    assert "norm trained beside this adapter and is no part of it" in caplog.text
    lowra.save(loaded, tmp_path / "again")
    manifests = [(tmp_path / folder / "lowra.json").read_bytes() for folder in ("whole", "again")]
    assert manifests[0] == manifests[1]


def test_a_folder_in_use_is_kept(written: Path) -> None:
    before = (written / "adapter_config.json").read_bytes()
    with pytest.raises(OutputError, match="not empty"):
        lowra.save_adapter(zeroed(), written)
    assert (written / "adapter_config.json").read_bytes() == before


def test_overwriting_replaces_an_adapter_and_never_a_checkpoint(
    own: Path, stack_folder: Path
) -> None:
    model = zeroed()
    lowra.save_adapter(model, own, overwrite=True)
    assert read_adapter(own).factors["first"][2] == 3.0
    with pytest.raises(OutputError, match="more than an adapter"):
        lowra.save_adapter(model, stack_folder, overwrite=True)


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OutputError, match="the disk is full"):
        lowra.save_adapter(target(), tmp_path / "adapter")
    assert not list(tmp_path.iterdir())
