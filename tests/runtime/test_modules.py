"""Quantized layers: state dicts, dtypes, copies, and the dense weight they stand for."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from lowra.backends.reference import embedding as embedding_ops
from lowra.backends.reference import linear as linear_ops
from lowra.compiler.storage import PackedWeight
from lowra.runtime.modules import QuantizedEmbedding, QuantizedLinear
from lowra.runtime.quantized_module import QuantizedModule
from tests.compiler.packed_weights import Case, packed_with_dense

WIDTHS = (1, 4, 2, 8, 3, 1, 4, 2)
CASE = Case(row_widths=WIDTHS, k=48, group=-1, shared=True, block=16, seed=3)
STORED = ("codes", "codebooks", "scales", "row_widths")


def packed(case: Case = CASE) -> PackedWeight:
    return packed_with_dense(case)[0]


def linear(case: Case = CASE, dtype: torch.dtype = torch.float32) -> QuantizedLinear:
    generator = torch.Generator().manual_seed(case.seed)
    bias = nn.Parameter(torch.randn(case.n, generator=generator), requires_grad=False)
    a = torch.randn(2, case.k, generator=generator)
    b = torch.randn(case.n, 2, generator=generator)
    return QuantizedLinear(packed(case), bias.to(dtype), dtype, (a, b, 0.5))


def embedding(dtype: torch.dtype = torch.float32) -> QuantizedEmbedding:
    return QuantizedEmbedding(packed(), dtype, nn.Embedding(CASE.n, CASE.k, padding_idx=1))


def inputs(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(3, 5, CASE.k, generator=torch.Generator().manual_seed(9)).to(dtype)


def test_the_weight_property_is_the_stored_weight_dequantized() -> None:
    for layer in (linear(), embedding()):
        assert torch.equal(layer.weight, layer.stored().dequantize())


def test_the_weight_property_is_the_weight_that_was_packed() -> None:
    _, dense = packed_with_dense(CASE)
    torch.testing.assert_close(linear().weight.double(), dense, rtol=1e-5, atol=1e-5)


def test_a_linear_computes_base_plus_bias_plus_scaled_adapter() -> None:
    layer, x = linear(), inputs()
    _, dense = packed_with_dense(CASE)
    base = functional.linear(x.double(), dense, layer.bias.double())
    adapter = 0.5 * (x.double() @ layer.lora_A.double().T) @ layer.lora_B.double().T
    torch.testing.assert_close(layer(x).double(), base + adapter, rtol=1e-5, atol=1e-4)


def test_a_linear_without_an_adapter_has_rank_zero_and_no_trainable_parameter() -> None:
    layer = QuantizedLinear(packed(), None, torch.float32)
    assert layer.rank == 0
    assert not list(layer.parameters())
    torch.testing.assert_close(layer(inputs()), functional.linear(inputs(), layer.weight))


def test_a_disabled_adapter_leaves_the_base_alone() -> None:
    layer, x = linear(), inputs()
    layer.adapter_enabled = False
    torch.testing.assert_close(layer(x), functional.linear(x, layer.weight, layer.bias))


def test_an_embedding_looks_up_rows_of_the_dequantized_weight() -> None:
    layer = embedding()
    ids = torch.tensor([[0, 7], [3, 3]])
    assert torch.equal(layer(ids), layer.weight[ids])
    assert layer.padding_idx == 1


def test_an_embedding_unpacks_no_more_rows_than_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    wide = Case(row_widths=WIDTHS * 8, k=48, group=-1, shared=True, block=16, seed=3)
    layer = QuantizedEmbedding(packed(wide), torch.bfloat16, nn.Embedding(wide.n, wide.k))
    ids = torch.tensor([[63, 7, 0]])
    want = layer.weight[ids]
    whole: list[int] = []
    stored_rows = linear_ops.stored_rows

    def noted(*given: Any) -> Tensor:
        whole.append(1)
        return stored_rows(*given)

    for name, kernel in linear_ops.kernels(noted).items():
        if name == "dequantize":
            monkeypatch.setattr(embedding_ops.torch.ops.lowra, name, kernel)
    assert torch.equal(layer(ids), want) and not whole
    many = ids.expand(wide.n, 3)
    assert torch.equal(layer(many), want.expand(wide.n, 3, 48)) and whole == [1]


def test_an_embedding_keeps_the_factor_of_the_one_it_replaces() -> None:
    source = nn.Embedding(CASE.n, CASE.k)
    source.embed_scale = 3.0
    layer = QuantizedEmbedding(packed(), torch.float32, source)
    assert torch.equal(layer(torch.tensor([2])), layer.weight[2:3] * 3.0)


def test_the_state_dict_holds_the_stored_tensors_and_the_adapter_and_nothing_else() -> None:
    assert set(linear().state_dict()) == {*STORED, "bias", "lora_A", "lora_B"}
    assert set(embedding().state_dict()) == set(STORED)


def test_a_layer_without_scales_stores_none() -> None:
    layer = QuantizedLinear(packed(Case(WIDTHS, 48)), None, torch.float32)
    assert set(layer.state_dict()) == {"codes", "codebooks", "row_widths"}
    torch.testing.assert_close(layer(inputs()), functional.linear(inputs(), layer.weight))


def test_loading_a_state_dict_derives_the_row_order_again() -> None:
    """The other layer has the same widths on other rows, so every stored shape fits."""
    source = linear()
    target = linear(Case(tuple(reversed(WIDTHS)), 48, -1, True, 16, seed=3))
    assert not torch.equal(source.order, target.order)
    assert not torch.equal(source(inputs()), target(inputs()))
    target.load_state_dict(source.state_dict())
    assert torch.equal(source.order, target.order)
    assert torch.equal(source(inputs()), target(inputs()))


def test_loading_a_state_dict_derives_the_panels_again() -> None:
    """1 + 8 + 2 rows hold as many words and table values whichever panel comes with which rows."""
    one = Case((4, 4, 2), 48, 0, False)
    source, target = linear(one), linear(Case((4, 2, 4), 48, 0, False, seed=1))
    target.load_state_dict(source.state_dict())
    assert target.panels == source.panels
    assert torch.equal(source(inputs()), target(inputs()))


def test_loading_by_assignment_gives_the_same_layer() -> None:
    source = linear()
    target = linear(Case(tuple(reversed(WIDTHS)), 48, -1, True, 16, seed=3))
    target.load_state_dict(source.state_dict(), assign=True)
    assert torch.equal(source(inputs()), target(inputs()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_cast_changes_the_compute_dtype_and_no_stored_tensor(dtype: torch.dtype) -> None:
    layer = linear()
    before = {role: getattr(layer, role).clone() for role in STORED}
    layer.to(dtype)
    assert layer.dtype == dtype
    assert layer.weight.dtype == dtype
    assert layer(inputs(dtype)).dtype == dtype
    assert layer.lora_A.dtype == layer.lora_B.dtype == layer.bias.dtype == dtype
    for role, old in before.items():
        assert getattr(layer, role).dtype == old.dtype
        assert torch.equal(getattr(layer, role), old)


def test_half_and_double_keep_codebooks_and_scales_in_float16() -> None:
    for layer in (linear(), embedding()):
        for cast, dtype in ((layer.half, torch.float16), (layer.double, torch.float64)):
            cast()
            assert layer.dtype == dtype
            assert layer.codebooks.dtype == layer.scales.dtype == torch.float16


def test_a_cast_there_and_back_changes_no_dequantized_weight() -> None:
    layer = embedding()
    before = layer.weight
    assert torch.equal(layer.to(torch.bfloat16).to(torch.float32).weight, before)


def test_a_cast_of_a_parent_casts_its_quantized_children() -> None:
    parent = nn.Sequential(linear()).to(torch.bfloat16)
    layer = parent[0]
    assert isinstance(layer, QuantizedModule)
    assert layer.dtype == torch.bfloat16
    assert layer.codebooks.dtype == torch.float16


def test_a_deep_copy_is_equal_and_independent() -> None:
    layer, x = linear(), inputs()
    twin = copy.deepcopy(layer)
    before = layer(x)
    assert torch.equal(twin(x), before)
    with torch.no_grad():
        twin.lora_A.add_(1)
        twin.codebooks.add_(1)
    assert not torch.equal(twin(x), before)
    assert torch.equal(layer(x), before)


def test_only_the_factors_require_grad() -> None:
    named = {name: p.requires_grad for name, p in linear().named_parameters()}
    assert named == {"bias": False, "lora_A": True, "lora_B": True}


def test_the_layer_prints_its_shape_bits_and_rank() -> None:
    layer = linear()
    bits = layer.stored().stored_bits() / (CASE.n * CASE.k)
    assert repr(layer) == (
        f"QuantizedLinear(in_features=48, out_features=8, bits={bits:.3f}, rank=2)"
    )


def test_a_state_dict_of_another_shape_is_refused() -> None:
    with pytest.raises(RuntimeError, match="size mismatch"):
        linear().load_state_dict(linear(Case((2,) * 8, 48, -1, True, 16)).state_dict())
