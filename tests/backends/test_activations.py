"""The choice of what products read activations as."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import lowra
from lowra.backends import activations
from lowra.backends.activations import SWITCHES
from lowra.backends.cpu import linear
from lowra.backends.cpu.activations import LARGEST_INTEGER_K, activations_for
from lowra.backends.cpu.tiers import best_tier
from lowra.workflows.bench import random_weight

VECTORS = pytest.mark.skipif(not best_tier().vectors, reason="plain C++ reads float32 alone")


@pytest.fixture(autouse=True)
def no_choice(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for switch in SWITCHES.values():
        monkeypatch.delenv(switch, raising=False)
    with activations.activations(None):
        yield


@VECTORS
def test_the_choice_is_for_halves() -> None:
    assert activations_for(torch.bfloat16, 576) == lowra.get_activations() == "int16"
    lowra.set_activations("int8")
    assert activations_for(torch.float16, 576) == lowra.get_activations() == "int8"
    assert activations_for(torch.float32, 576) == "float32"
    assert activations_for(torch.bfloat16, LARGEST_INTEGER_K + 1) == "float32"


def test_a_block_ends_with_what_was_before() -> None:
    lowra.set_activations("float32")
    with pytest.raises(KeyError), activations.activations("int8"):
        raise KeyError
    assert lowra.get_activations() == "float32"


@pytest.mark.parametrize(("device", "usual"), [("cpu", "int16"), ("cuda", "bfloat16")])
def test_the_environment_chooses_until_someone_does(
    device: str, usual: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert lowra.get_activations(device) == usual
    monkeypatch.setenv(SWITCHES[device], "float32")
    assert lowra.get_activations(device) == "float32"
    lowra.set_activations("int8")
    assert lowra.get_activations("cpu") == lowra.get_activations("cuda") == "int8"


@pytest.mark.parametrize("kind", ["int4", "INT8", ""])
def test_another_kind_is_refused(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(lowra.LowraError, match="int16, int8, bfloat16, float32"):
        lowra.set_activations(kind)
    assert lowra.get_activations() == "int16"
    monkeypatch.setenv(SWITCHES["cpu"], kind or "no")
    with pytest.raises(lowra.LowraError, match="is no type of activations"):
        lowra.get_activations()


@VECTORS
def test_products_follow_the_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the same weight; with AVX-512 also for as many tokens as would else be unpacked."""
    packed = random_weight(40, 576, 2).op_args()
    x = torch.randn(200, 576, generator=torch.Generator().manual_seed(3)).bfloat16()
    few = x if best_tier().vectors == "avx512" else x[:16]
    exact = torch.ops.lowra.quantized_linear(few.double(), *packed, None)
    errors = {}
    for kind in ("float32", "int16", "int8"):
        lowra.set_activations(kind)
        y = torch.ops.lowra.quantized_linear(few, *packed, None)
        errors[kind] = float((y - exact).norm() / exact.norm())
    assert errors["float32"] < 4e-3 and errors["int16"] < 4e-3 < errors["int8"] < 2e-2
    served: list[str] = []
    monkeypatch.setattr(linear, "product", lambda x, ready, *_: served.append(ready.name))
    torch.ops.lowra.quantized_linear(x, *packed, None)
    assert len(served) == (best_tier().vectors == "avx512")


def test_another_type_of_device_is_refused() -> None:
    with pytest.raises(lowra.LowraError, match="'mps' is no type of device: give cpu or cuda"):
        lowra.get_activations("mps")
