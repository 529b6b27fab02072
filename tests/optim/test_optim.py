"""Optimisers of adapters: their formulas, and that the split of the product does not matter."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lowra.optim import LoRARite, OPLoRA, Pair, pairs_of
from lowra.optim.oplora import nearest_factors, tangent_gradient
from lowra.optim.pairs import adamw

DRAWN = settings(max_examples=25, deadline=None, derandomize=True)
SHAPES = (st.integers(6, 20), st.integers(6, 20), st.integers(1, 4), st.integers(0, 99))


class Adapted(nn.Module):
    """y = W x + b (a x), with a bias that trains."""

    def __init__(self, n: int, k: int, r: int, seed: int = 0, dtype=torch.float64) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.lora_A = nn.Parameter(torch.randn(r, k, generator=generator, dtype=dtype))
        self.lora_B = nn.Parameter(torch.randn(n, r, generator=generator, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(n, dtype=dtype))
        self.target = torch.randn(n, k, generator=generator, dtype=dtype)
        self.x = torch.randn(3 * k, k, generator=generator, dtype=dtype)

    def product(self) -> Tensor:
        return (self.lora_B @ self.lora_A).detach()

    def loss(self) -> Tensor:
        miss = (self.lora_B @ self.lora_A - self.target) @ self.x.T + self.bias[:, None]
        return miss.square().mean()

    def split_by(self, matrix: Tensor) -> Adapted:
        other = copy.deepcopy(self)
        other.lora_A.data = torch.linalg.solve(matrix, self.lora_A.data)
        other.lora_B.data = self.lora_B.data @ matrix
        return other


def run(model: Adapted, optimizer: torch.optim.Optimizer, steps: int) -> list[Tensor]:
    products = []
    for _ in range(steps):
        optimizer.zero_grad()
        model.loss().backward()
        optimizer.step()
        products.append(model.product())
    return products


def well_conditioned(r: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed + 1)
    left, right = (
        torch.linalg.qr(torch.randn(r, r, generator=generator, dtype=torch.float64))[0]
        for _ in range(2)
    )
    return (
        left @ torch.diag(torch.rand(r, generator=generator, dtype=torch.float64) * 9 + 0.5) @ right
    )


MAKERS = {
    "lora-rite": lambda m: LoRARite(m, lr=0.02),
    "lora-rite without escape": lambda m: LoRARite(m, lr=0.02, escape=False, clip=0.0),
    "oplora": lambda m: OPLoRA(m, lr=0.05),
    "oplora, two passes": lambda m: OPLoRA(m, lr=0.05, momentum=0.0, passes=2),
}


@pytest.mark.parametrize("name", MAKERS)
@DRAWN
@given(*SHAPES)
def test_the_split_of_the_product_does_not_matter(name, n, k, r, seed) -> None:
    model = Adapted(n, k, r, seed)
    other = model.split_by(well_conditioned(r, seed))
    torch.testing.assert_close(other.product(), model.product())
    mine, its = run(model, MAKERS[name](model), 4), run(other, MAKERS[name](other), 4)
    for one, two in zip(mine, its, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(mine[-1], mine[0])


def test_adamw_moves_otherwise_when_the_split_changes() -> None:
    """The test above can fail."""
    model = Adapted(8, 9, 3)
    other = model.split_by(well_conditioned(3, 0))
    rates = {"lr": 0.02}
    mine = run(model, torch.optim.AdamW(model.parameters(), **rates), 4)
    its = run(other, torch.optim.AdamW(other.parameters(), **rates), 4)
    assert not torch.allclose(mine[-1], its[-1], rtol=1e-2, atol=1e-2)


def test_the_first_step_of_lora_rite_by_its_formulas() -> None:
    model = Adapted(7, 9, 3)
    model.loss().backward()
    a, b = model.lora_A.detach().clone(), model.lora_B.detach().clone()
    wanted = []
    for factor, partner, gradient in (
        (b, a.T, model.lora_B.grad), (a.T, b, model.lora_A.grad.T)
    ):  # fmt: skip
        _, upper = torch.linalg.qr(partner)
        g = gradient @ upper.inverse()
        values, vectors = torch.linalg.eigh(g.T @ g / len(g))
        step = g @ (vectors / (values.sqrt() + 1e-6)) @ vectors.T
        wanted.append(factor - 0.02 * step @ upper.inverse().T)
    LoRARite(model, lr=0.02, clip=0.0).step()
    torch.testing.assert_close(model.lora_B.detach(), wanted[0])
    torch.testing.assert_close(model.lora_A.detach(), wanted[1].T)


def test_lora_rite_keeps_what_a_turn_of_the_basis_lost() -> None:
    """A basis that turns away from all of V leaves V's largest eigenvalue as escaped mass."""
    model = Adapted(6, 8, 2)
    optimizer = LoRARite(model, lr=0.0, clip=0.0)
    old = torch.eye(8, dtype=torch.float64)
    model.lora_A.data = old[:2].clone()
    model.loss().backward()
    optimizer.step()
    before = torch.linalg.eigvalsh(optimizer.state[model.lora_B]["second"]).max()
    model.lora_A.data = old[2:4].clone()
    optimizer.step()
    share = 0.999 * (1 - 0.999) / (1 - 0.999**2)
    torch.testing.assert_close(optimizer.state[model.lora_B]["escaped"].double(), share * before)


@DRAWN
@given(*SHAPES)
def test_oplora_sees_the_part_of_the_gradient_in_the_tangent_space(n, k, r, seed) -> None:
    model = Adapted(n, k, r, seed)
    whole = torch.randn(n, k, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    pair = Pair(model.lora_A, model.lora_B)
    pair.a.grad, pair.b.grad = pair.b.detach().T @ whole, whole @ pair.a.detach().T
    left, right = tangent_gradient(pair)
    p_a = pair.a.T @ torch.linalg.pinv(pair.a.T)
    p_b = pair.b @ torch.linalg.pinv(pair.b)
    wanted = p_b @ whole + whole @ p_a - p_b @ whole @ p_a
    torch.testing.assert_close(left @ right, wanted.detach(), rtol=1e-6, atol=1e-6)


def test_alternating_least_squares_nears_the_truncated_svd() -> None:
    generator = torch.Generator().manual_seed(0)
    left = torch.randn(15, 6, generator=generator, dtype=torch.float64)
    right = torch.randn(6, 12, generator=generator, dtype=torch.float64)
    start = Pair(*(torch.randn(*s, generator=generator, dtype=torch.float64)
                   for s in ((3, 12), (15, 3))))  # fmt: skip
    whole = left @ right
    u, s, v = torch.linalg.svd(whole)
    best = (whole - u[:, :3] * s[:3] @ v[:3]).norm()
    misses = []
    for passes in (1, 2, 30):
        a, b = nearest_factors(left, right, start, passes)
        misses.append(float((whole - b @ a).norm() / best))
    assert misses == sorted(misses, reverse=True)
    assert misses[0] < 1.5 and misses[-1] < 1.001


def test_half_a_step_of_oplora_is_preconditioned_lora() -> None:
    model = Adapted(7, 9, 3)
    model.loss().backward()
    pair = Pair(model.lora_A, model.lora_B)
    left, right = tangent_gradient(pair)
    a, b = pair.a.detach(), pair.b.detach()
    terms = torch.cat((b, -0.1 * left), 1), torch.cat((a, right))
    half = terms[0] @ (terms[1] @ a.T) @ (a @ a.T).inverse()
    torch.testing.assert_close(half, b - 0.1 * pair.b.grad @ (a @ a.T).inverse())


@pytest.mark.parametrize("maker", [LoRARite, OPLoRA])
def test_an_adapter_that_starts_at_zero_trains(maker) -> None:
    model = Adapted(8, 10, 2, dtype=torch.float32)
    model.lora_B.data.zero_()
    rate = {"lr": 0.05} if maker is LoRARite else {"lr": 0.5}
    before = model.loss().item()
    run(model, maker(model, **rate), 60)
    assert model.loss().item() < 0.8 * before
    assert int(torch.linalg.matrix_rank(model.product())) == 2


@pytest.mark.parametrize("name", MAKERS)
def test_a_run_goes_on_from_its_state(name) -> None:
    model = Adapted(8, 10, 2, dtype=torch.float32)
    optimizer = MAKERS[name](model)
    run(model, optimizer, 3)
    other = copy.deepcopy(model)
    fresh = MAKERS[name](other)
    fresh.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert torch.equal(run(model, optimizer, 3)[-1], run(other, fresh, 3)[-1])
    assert torch.equal(model.bias, other.bias)


def test_adamw_of_what_else_trains_is_torchs() -> None:
    ours, theirs = (torch.ones(5, dtype=torch.float64).requires_grad_() for _ in range(2))
    optimizer = torch.optim.AdamW([theirs], lr=0.01, weight_decay=0.1)
    state: dict = {}
    for step in range(4):
        gradient = torch.arange(5.0).double() - step
        theirs.grad = gradient.clone()
        optimizer.step()
        with torch.no_grad():
            adamw(ours, gradient, state, 0.01, 0.1)
    torch.testing.assert_close(ours, theirs)


def test_a_scheduler_moves_each_group_by_its_own_rate() -> None:
    optimizer = OPLoRA(Adapted(4, 5, 2), lr=2.0, others_lr=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    optimizer.step()
    schedule.step()
    assert [group["lr"] for group in optimizer.param_groups] == [1.0, 0.05]


def test_peft_names_are_known() -> None:
    layer = nn.Module()
    layer.lora_A = nn.ModuleDict({"default": nn.Linear(6, 2, bias=False)})
    layer.lora_B = nn.ModuleDict({"default": nn.Linear(2, 5, bias=False)})
    pairs, others = pairs_of(layer)
    assert [tuple(p.a.shape) + tuple(p.b.shape) for p in pairs] == [(2, 6, 5, 2)]
    assert not others


@pytest.mark.parametrize("lone", ["lora_A", "lora_B"])
def test_a_factor_without_its_partner_is_refused(lone) -> None:
    model = Adapted(4, 5, 2)
    getattr(model, "lora_B" if lone == "lora_A" else "lora_A").requires_grad_(False)
    with pytest.raises(ValueError, match=f"{lone}.*trains, and"):
        LoRARite(model)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda m: LoRARite(m, lr=-1.0), "lr=-1.0"),
        (lambda m: LoRARite(m, betas=(0.9, 1.0)), "betas"),
        (lambda m: OPLoRA(m, momentum=1.0), "momentum=1.0"),
        (lambda m: OPLoRA(m, passes=0), "passes=0"),
        (lambda m: OPLoRA(m, weight_decay=float("nan")), "weight_decay=nan"),
        (lambda m: OPLoRA(nn.Linear(2, 2)), "no adapter"),
    ],
)
def test_bad_settings_are_refused(make, message) -> None:
    with pytest.raises(ValueError, match=message):
        make(Adapted(4, 5, 2))
