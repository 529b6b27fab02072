"""PEFT both ways: our adapters on its models, its adapters on ours, its layers around ours."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch.nn import functional

peft = pytest.importorskip("peft", minversion="0.21")

import lowra  # noqa: E402
from lowra.compiler.errors import AdapterError, CheckpointError  # noqa: E402
from lowra.runtime.module_view import quantized_linears  # noqa: E402
from lowra.runtime.modules import QuantizedLinear  # noqa: E402
from tests.runtime.compiled_models import EIGHT, compile_case, low_llama  # noqa: E402
from tests.runtime.peft_models import (  # noqa: E402
    TARGETS,
    adapted,
    bare_gpt2,
    bare_llama,
    config,
    load,
    logits,
    own,
    peft_layers,
    saved,
    shifted,
)

# --- ours on the original model -------------------------------------------------------------------


def assert_same_factors(model: Any, on_peft: Any) -> None:
    """PEFT holds our A and B bit for bit, and multiplies with our scaling."""
    ours = {name: layer for name, layer in quantized_linears(model).items() if layer.rank}
    theirs = peft_layers(on_peft)
    assert set(theirs) == set(ours)
    for name, layer in ours.items():
        assert torch.equal(theirs[name].lora_A["default"].weight, layer.lora_A)
        assert torch.equal(theirs[name].lora_B["default"].weight, layer.lora_B)
        assert theirs[name].scaling["default"] == layer.scaling


def test_an_adapter_trained_on_a_compiled_model_loads_in_peft_on_the_original(
    tmp_path: Path,
) -> None:
    model = shifted(low_llama())
    folder = lowra.save_adapter(model, tmp_path / "adapter")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Unexpected keyword|Found missing adapter keys")
        on_peft = peft.PeftModel.from_pretrained(low_llama().build(), str(folder))
    assert_same_factors(model, on_peft)
    dense, layer = low_llama().build(), quantized_linears(model)["model.layers.0.mlp.up_proj"]
    x = torch.randn(3, layer.k)
    weight = dense.get_submodule("model.layers.0.mlp.up_proj").weight
    expected = functional.linear(x, weight) + layer.scaling * (x @ layer.lora_A.T) @ layer.lora_B.T
    found = peft_layers(on_peft)["model.layers.0.mlp.up_proj"](x)
    torch.testing.assert_close(found, expected)


def test_a_checkpoint_folder_is_an_adapter_that_peft_loads(llama_folder: Path) -> None:
    on_peft = peft.PeftModel.from_pretrained(low_llama().build(), str(llama_folder))
    assert_same_factors(low_llama().compiled, on_peft)


def test_ranks_and_scalings_that_differ_by_layer_survive_peft_and_back(tmp_path: Path) -> None:
    model = shifted(low_llama())
    for position, layer in enumerate(quantized_linears(model).values()):
        rank = 2 + position % 3
        a, b = torch.randn(rank, layer.k), torch.randn(layer.n, rank)
        layer.set_adapter(a, b, (0.1, 1, 16, 7.3)[position % 4] / rank)
    folder = lowra.save_adapter(model, tmp_path / "ours")
    on_peft = peft.PeftModel.from_pretrained(low_llama().build(), str(folder))
    assert_same_factors(model, on_peft)
    back = load(low_llama().compiled, saved(on_peft, tmp_path / "theirs"))
    assert_same_factors(back, on_peft)
    assert torch.equal(logits(back, low_llama()), logits(model, low_llama()))


# --- theirs on a compiled base --------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 3}, "alpha_pattern": {"down_proj": 5}},
        {"target_modules": r".*\.(up|o)_proj"},
        {"init_lora_weights": "gaussian", "lora_dropout": 0.5, "bias": "lora_only"},
    ],
    ids=["plain", "rslora", "patterns", "regex", "bias-without-a-bias"],
)
def test_an_adapter_of_the_original_adds_its_term_to_the_compiled_base(
    options: dict[str, Any], tmp_path: Path
) -> None:
    case = bare_llama()
    original = adapted(case.dense, **options)
    folder = saved(original, tmp_path / "adapter")
    model = load(case.compiled, folder)
    layers = quantized_linears(model)
    for name, theirs in peft_layers(original).items():
        assert torch.equal(theirs.lora_A["default"].weight, layers[name].lora_A)
        assert torch.equal(theirs.lora_B["default"].weight, layers[name].lora_B)
        assert theirs.scaling["default"] == layers[name].scaling
        x = torch.randn(2, layers[name].k)
        with torch.no_grad():
            term = theirs.lora_B["default"](theirs.lora_A["default"](x)) * layers[name].scaling
            base = case.compiled.get_submodule(name)(x)
            torch.testing.assert_close(layers[name](x), base + term)
    around = peft.PeftModel.from_pretrained(own(case.compiled), str(folder)).eval()
    torch.testing.assert_close(logits(model, case), logits(around, case))
    assert not torch.allclose(logits(model, case), logits(case.compiled, case))


def test_layers_that_an_adapter_does_not_name_have_none(tmp_path: Path) -> None:
    folder = saved(adapted(low_llama().dense), tmp_path / "adapter")
    layers = quantized_linears(load(low_llama().compiled, folder))
    ranks = {name.rpartition(".")[2]: layer.rank for name, layer in layers.items()}
    assert {name for name, rank in ranks.items() if rank} == set(TARGETS)


def test_on_top_the_models_own_adapter_stays(tmp_path: Path) -> None:
    case = low_llama()
    folder = saved(adapted(case.dense), tmp_path / "adapter")
    both = load(case.compiled, folder, on_top=True)
    around = peft.PeftModel.from_pretrained(own(case.compiled), str(folder)).eval()
    torch.testing.assert_close(logits(both, case), logits(around, case))
    ranks = {name: layer.rank for name, layer in quantized_linears(both).items()}
    assert set(ranks.values()) == {4, 8}


def test_an_adapter_of_conv1d_layers_comes_in_and_leaves(tmp_path: Path) -> None:
    """PEFT transposes nothing in its files for fan_in_fan_out, only when it merges."""
    case = bare_gpt2()
    original = adapted(case.dense, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True)
    model = load(case.compiled, saved(original, tmp_path / "theirs"))
    merged = original.merge_and_unload()
    layer = quantized_linears(model)["transformer.h.0.mlp.c_fc"]
    delta = (
        merged.transformer.h[0].mlp.c_fc.weight.T - case.dense.transformer.h[0].mlp.c_fc.weight.T
    )  # pyright: ignore
    torch.testing.assert_close(layer.scaling * layer.lora_B @ layer.lora_A, delta)
    folder = lowra.save_adapter(model, tmp_path / "ours")
    on_peft = peft.PeftModel.from_pretrained(own(case.dense), str(folder))
    assert_same_factors(model, on_peft)


# --- peft's layers around ours --------------------------------------------------------------------


@pytest.mark.parametrize("targets", ["all-linear", TARGETS], ids=["all-linear", "names"])
def test_get_peft_model_wraps_trains_saves_and_loads(targets: Any, tmp_path: Path) -> None:
    case = bare_llama()
    model = peft.get_peft_model(own(case.compiled), config(target_modules=targets, r=2))
    wrapped = peft_layers(model)
    assert len(wrapped) == (7 if targets == "all-linear" else 2)
    assert all(isinstance(layer.base_layer, QuantizedLinear) for layer in wrapped.values())
    before = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    losses = train(model, case.inputs)
    assert losses[-1] < losses[0] - 0.1
    after = dict(model.named_parameters())
    assert before and all(torch.equal(after[name], p) for name, p in before.items())
    folder = saved(model, tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(own(case.compiled), str(folder))
    assert torch.equal(logits(again.eval(), case), logits(model.eval(), case))
    torch.testing.assert_close(logits(load(case.compiled, folder), case), logits(model, case))


def train(model: Any, inputs: dict[str, torch.Tensor]) -> list[float]:
    """The losses of 8 steps of AdamW on one batch."""
    chosen = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(chosen, lr=0.02)
    losses: list[float] = []
    for _ in range(8):
        loss = model(**inputs, labels=inputs["input_ids"]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_under_peft_the_models_own_adapter_is_frozen_and_stays_in_the_sum() -> None:
    case = low_llama()
    model = peft.get_peft_model(own(case.compiled), config())
    inner = {name for name, p in model.named_parameters() if p.requires_grad}
    assert inner and not any("base_layer" in name for name in inner)
    assert torch.equal(logits(model, case), logits(case.compiled, case)), "B starts at zero"


def test_gradients_under_peft_are_those_of_plain_peft_on_the_same_dense_weights() -> None:
    """In float64, each compiled layer replaced by the dense weight that it stands for."""
    case = bare_llama()
    ours = adapted(own(case.compiled).double(), target_modules="all-linear")
    dense = own(case.dense).double()
    for name, layer in quantized_linears(own(case.compiled).double()).items():
        with torch.no_grad():
            dense.get_submodule(name).weight.copy_(layer.weight)
    plain = adapted(dense, target_modules="all-linear")
    for model in (ours, plain):
        model(**case.inputs, labels=case.inputs["input_ids"]).loss.backward()
    expected = {n: p.grad for n, p in plain.named_parameters() if p.grad is not None}
    found = {n: p.grad for n, p in ours.named_parameters() if p.grad is not None}
    assert len(expected) == 14
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("case", [bare_llama, low_llama], ids=["bare", "own adapter"])
def test_dora_through_peft_is_exact_on_the_weight_that_the_layer_multiplies_with(case: Any) -> None:
    """y = m / |W + s B A| * (W + s B A) x (DoRA, arXiv 2402.09353), W with the own adapter."""
    model = adapted(case().compiled, use_dora=True)
    for layer in peft_layers(model).values():
        base = layer.base_layer
        with torch.no_grad():
            magnitude = layer.lora_magnitude_vector["default"].weight
            magnitude.mul_(torch.rand_like(magnitude) + 0.5)
        own_part = base.scaling * base.lora_B @ base.lora_A if base.rank else 0.0
        step = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        joint = base.weight + own_part + layer.scaling["default"] * step
        x = torch.randn(3, base.k)
        expected = functional.linear(x, joint * (magnitude / joint.norm(dim=1))[:, None])
        torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)


def test_peft_reads_few_dense_weights_to_wrap_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is a pass over the packed weight: a large model would be wrapped for minutes."""
    reads: list[str] = []
    dense = QuantizedLinear._dense
    monkeypatch.setattr(QuantizedLinear, "_dense", lambda m: (reads.append("x"), dense(m))[1])
    peft.get_peft_model(own(bare_llama().compiled), config(target_modules="all-linear"))
    assert len(reads) <= 3 * 7


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize("safe", [False, True])
def test_peft_cannot_merge_into_a_packed_weight(safe: bool) -> None:
    model = adapted(bare_llama().compiled)
    before = logits(model.eval(), bare_llama())
    with pytest.raises(AdapterError, match="lowra adapter merge"):
        model.merge_and_unload(safe_merge=safe)
    assert torch.equal(logits(model, bare_llama()), before)


@pytest.mark.parametrize("start", ["pissa", "olora", "pissa_niter_2"])
def test_starts_that_change_the_weight_are_refused(start: str) -> None:
    with pytest.raises(AdapterError, match="init_lora_weights=True"):
        peft.get_peft_model(own(bare_llama().compiled), config(init_lora_weights=start))


def test_an_adapter_started_from_a_changed_base_is_refused_unless_told(tmp_path: Path) -> None:
    folder = saved(adapted(bare_llama().dense, init_lora_weights="pissa"), tmp_path / "adapter")
    with pytest.raises(AdapterError, match="init_lora_weights='pissa'"):
        load(bare_llama().compiled, folder)
    assert quantized_linears(load(bare_llama().compiled, folder, check_base=False))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"use_dora": True}, "use_dora=True: DoRA rescales .*PeftModel.from_pretrained"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save=.* merge it into the original"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "embed_tokens.*, no LoRA factor"),
        ({"target_modules": ["q_proj", "lm_head"]}, "lm_head.*, no LoRA factor"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
    ],
)
def test_what_is_more_than_lora_is_refused_with_the_way_out(
    options: dict[str, Any], said: str, tmp_path: Path
) -> None:
    folder = saved(adapted(bare_llama().dense, **options), tmp_path / "adapter")
    with pytest.raises(AdapterError, match=said):
        load(bare_llama().compiled, folder)


def test_a_trained_bias_is_refused(tmp_path: Path) -> None:
    original = adapted(bare_gpt2().dense, target_modules=["c_fc"], bias="lora_only")
    with pytest.raises(AdapterError, match=r"c_fc\..*bias, no LoRA factor"):
        load(bare_gpt2().compiled, saved(original, tmp_path / "adapter"))


def test_another_method_is_refused(tmp_path: Path) -> None:
    wrapped = peft.get_peft_model(own(bare_llama().dense), peft.LoHaConfig(target_modules=TARGETS))
    with pytest.raises(AdapterError, match="of type 'LOHA'"):
        load(bare_llama().compiled, saved(wrapped, tmp_path / "adapter"))


def test_a_model_that_peft_wraps_is_neither_saved_nor_given_an_adapter(tmp_path: Path) -> None:
    inner = own(low_llama().compiled)
    folder = lowra.save_adapter(inner, tmp_path / "own")
    wrapped = peft.get_peft_model(inner, config())
    for action in (
        lambda: lowra.save(inner, tmp_path / "checkpoint"),
        lambda: lowra.load_adapter(inner, folder),
        lambda: lowra.merge_adapter(inner),
    ):
        with pytest.raises(AdapterError, match=r"\.unload\(\)"):
            action()
    with pytest.raises(AdapterError, match="pass the PeftModel"):
        lowra.save_adapter(inner, tmp_path / "inner")
    with pytest.raises(CheckpointError, match="not compiled"):
        lowra.save(wrapped, tmp_path / "checkpoint")


# --- the base's fingerprint -----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["default", "other"])
def test_what_peft_trained_carries_the_base_when_lowra_saves_it(name: str, tmp_path: Path) -> None:
    case = bare_llama()
    model = peft.get_peft_model(own(case.compiled), config(), adapter_name=name)
    train(model, case.inputs)
    folder = lowra.save_adapter(model, tmp_path / "adapter")
    with safe_open(folder / "adapter_model.safetensors", "pt") as opened:  # pyright: ignore
        assert opened.metadata()["lowra.model"] == case.compiled.lowra.fingerprint  # pyright: ignore
    torch.testing.assert_close(
        logits(load(case.compiled, folder), case), logits(model.eval(), case)
    )
    again = peft.PeftModel.from_pretrained(own(case.compiled), str(folder))
    assert torch.equal(logits(again.eval(), case), logits(model, case))
    with pytest.raises(AdapterError, match="another compile"):
        load(low_llama().compiled, folder)


def test_what_was_trained_above_the_own_adapter_goes_on_top_of_it_and_nowhere_else(
    tmp_path: Path,
) -> None:
    case = low_llama()
    model = peft.get_peft_model(own(case.compiled), config())
    train(model, case.inputs)
    folder = lowra.save_adapter(model, tmp_path / "adapter")
    both = load(case.compiled, folder, on_top=True)
    torch.testing.assert_close(logits(both, case), logits(model.eval(), case))
    with pytest.raises(AdapterError, match="another compile"):
        load(case.compiled, folder)


def test_two_active_adapters_are_not_saved_as_one(tmp_path: Path) -> None:
    model = peft.get_peft_model(own(bare_llama().compiled), config())
    model.add_adapter("second", config())
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(AdapterError, match="2 adapters are active"):
        lowra.save_adapter(model, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_an_adapter_in_bfloat16_keeps_its_bits(tmp_path: Path) -> None:
    case = compile_case(lambda: bare_llama().build().to(torch.bfloat16), **{**EIGHT, "rank": 2})
    folder = lowra.save_adapter(case.compiled, tmp_path / "adapter")
    back = load(case.compiled, folder)
    for name, layer in quantized_linears(case.compiled).items():
        assert torch.equal(back.get_submodule(name).lora_B, layer.lora_B)
        assert layer.lora_B.dtype == torch.bfloat16  # pyright: ignore
