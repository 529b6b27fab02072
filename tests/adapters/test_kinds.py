"""LoRA-XS, NOLA and MultiLoRA against their published formulas; random matrices by seed."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from lowra.adapters.kinds import NOLA, Kind, LoRAXS, MultiLoRA, singular_basis, singular_pair
from lowra.adapters.philox import combination, uniform
from lowra.compiler.adapter_delta import SiteDelta, runs_of
from lowra.compiler.adapter_pages import CORE, DIAGONAL, A, B, read_chunk
from lowra.compiler.errors import AdapterError

N, K = 24, 40


def part(site: SiteDelta, role: int) -> Tensor:
    values = []
    for run in runs_of(site.parts[role]):
        line = (role, 0, run.rows, run.format, run.columns, run.group, 0)
        values.append(read_chunk(torch.from_numpy(run.words()), line))
    return torch.cat(values).double()


def dense(site: SiteDelta) -> Tensor:
    """The change of W that a site stands for, float64 [n, k]."""
    core = torch.eye(site.rank).double()
    if DIAGONAL in site.parts:
        core = part(site, DIAGONAL)[0] * core
    if CORE in site.parts:
        core = part(site, CORE) @ core
    return site.scaling * part(site, B).T @ core @ part(site, A)


def test_numbers_of_a_seed_are_these() -> None:
    """Philox4x64-10: Random123's test vector of key and counter 0, and how numbers come of it."""
    raw = np.random.Philox(key=0, counter=np.array([2**64 - 1] * 4, dtype=np.uint64)).random_raw(4)
    known = (0x16554D9ECA36314C, 0xDB20FE9D672D0FDC, 0xD7E772CEE186176B, 0x7E68B68AEC7BA23B)
    assert tuple(int(word) for word in raw) == known
    values = uniform(3, 1, (2, 3))
    assert torch.equal(values, uniform(3, 1, (6,)).view(2, 3))
    words = np.random.Philox(key=3, counter=np.array([0, 0, 0, 1], dtype=np.uint64)).random_raw(1)
    low, high = int(words[0]) & (2**32 - 1), int(words[0]) >> 32
    assert values[0, :2].tolist() == [(low >> 8) / 2**23 - 1, (high >> 8) / 2**23 - 1]
    many = uniform(0, 0, (100_000,)).double()
    assert abs(float(many.mean())) < 0.01 and abs(float(many.square().mean()) - 1 / 3) < 0.01
    assert not torch.equal(uniform(0, 0, (8,)), uniform(0, 1, (8,)))


def test_a_combination_of_random_matrices_and_its_gradient() -> None:
    coefficients = torch.randn(5, dtype=torch.float64, requires_grad=True)
    total = combination(coefficients, 7, (3, 4))
    each = torch.stack([uniform(7, i, (3, 4)).double() for i in range(5)])
    torch.testing.assert_close(total, torch.einsum("i,iab->ab", coefficients, each))
    target = torch.randn(3, 4, dtype=torch.float64)
    (total * target).sum().backward()
    want = torch.einsum("ab,iab->i", target, each)
    torch.testing.assert_close(coefficients.grad, want, rtol=1e-5, atol=1e-6)


def made(kind: str) -> Kind:
    torch.manual_seed(0)
    if kind == "lora-xs":
        basis = singular_basis({"up": torch.randn(N, K)}, 4)
        module: Kind = LoRAXS("up", N, K, basis=basis, scaling=2.0)
    elif kind == "nola":
        module = NOLA("up", N, K, rank=3, count=6, seed=1, scaling=0.5)
    else:
        module = MultiLoRA("up", N, K, rank=2, count=3, seed=1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return module


@pytest.mark.parametrize("kind", ["lora-xs", "nola", "multi-lora"])
def test_what_trains_is_what_a_pool_serves(kind: str) -> None:
    module, x = made(kind), torch.randn(5, K)
    with torch.no_grad():
        want = x.double() @ dense(module.site()).T
    torch.testing.assert_close(module(x).double(), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["lora-xs", "nola", "multi-lora"])
def test_every_parameter_gets_a_gradient(kind: str) -> None:
    module = made(kind)
    module(torch.randn(5, K)).square().sum().backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None and bool((parameter.grad != 0).any()), name


@pytest.mark.parametrize("shape", [(N, K), (K, N)])
def test_lora_xs_is_b_r_a_in_the_singular_directions_of_the_weight(shape: tuple[int, int]) -> None:
    weight = torch.randn(*shape, dtype=torch.float64)
    u, sigma, vh = torch.linalg.svd(weight, full_matrices=False)
    a, b = singular_pair(weight, 4)
    torch.testing.assert_close(b.double().T @ a.double(), (u * sigma)[:, :4] @ vh[:4], **CLOSE)
    torch.testing.assert_close(b.double() @ b.double().T, torch.eye(4).double(), **CLOSE)
    torch.testing.assert_close(a.double().norm(dim=1), sigma[:4], **CLOSE)
    module = LoRAXS("up", *shape, basis=singular_basis({"up": weight}, 4), scaling=2.0)
    with torch.no_grad():
        module.r.normal_()
    x = torch.randn(3, shape[1])
    want = 2 * x.double() @ a.double().T @ module.r.detach().double().T @ b.double()
    torch.testing.assert_close(module(x).detach().double(), want, rtol=1e-4, atol=1e-4)
    assert [name for name, _ in module.named_parameters()] == ["r"]
    with pytest.raises(AdapterError, match=r"rank 99 is not in 1\.\.24"):
        singular_pair(weight, 99)


CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def test_nola_is_lora_with_factors_from_random_bases() -> None:
    module = made("nola")
    assert isinstance(module, NOLA)
    alpha, beta = module.alpha.detach().double(), module.beta.detach().double()
    a = uniform(2, 6, (3, K)).double() / math.sqrt(K)
    b = torch.zeros(N, 3, dtype=torch.float64)
    for i in range(6):
        a = a + alpha[i] * uniform(2, i, (3, K)).double()
        b = b + beta[i] * uniform(3, i, (N, 3)).double()
    torch.testing.assert_close(dense(module.site()), 0.5 * b @ a, rtol=1e-4, atol=1e-5)
    fresh = NOLA("up", N, K, rank=3, count=6)
    assert not fresh(torch.randn(2, K)).any(), "it starts as no change"
    assert sum(p.numel() for p in fresh.parameters()) == 12


def test_multi_lora_is_a_scaled_sum_of_loras() -> None:
    module = made("multi-lora")
    assert isinstance(module, MultiLoRA)
    a, b, s = (p.detach().double() for p in (module.a, module.b, module.scales))
    want = sum(s[i] * b[:, 2 * i : 2 * i + 2] @ a[2 * i : 2 * i + 2] for i in range(3))
    assert isinstance(want, Tensor)
    torch.testing.assert_close(dense(module.site()), want, rtol=1e-4, atol=1e-5)
    assert not MultiLoRA("up", N, K)(torch.randn(2, K)).any(), "it starts as no change"


@pytest.mark.parametrize("kind", [NOLA, MultiLoRA])
def test_options_without_meaning_are_refused(kind: type) -> None:
    for options in ({"rank": 0}, {"count": 0}, {"seed": -1}):
        with pytest.raises(AdapterError, match=f"of up: .*{next(iter(options))} "):
            kind("up", N, K, **options)
