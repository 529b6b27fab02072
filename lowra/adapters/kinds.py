"""Kinds of adapters that train here: LoRA-XS, NOLA and MultiLoRA, each as its paper has it.

A kind is a module for one linear [n, k]: called on x it gives the change of W x, and `site()` is
that change as a pool serves it. Plain LoRA and rsLoRA are the model's own adapter; DoRA and VeRA
train in PEFT.
"""

from __future__ import annotations

import math
import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from lowra.adapters.philox import combination, uniform
from lowra.compiler.adapter_delta import Basis, Part, Shared, SiteDelta, dense_site
from lowra.compiler.adapter_pages import CORE, DIAGONAL, A, B, dense_run
from lowra.compiler.errors import AdapterError


class Kind(nn.Module, ABC):
    """One linear's adapter while it trains. What trains, and nothing else, is its parameters."""

    kind: ClassVar[str]
    numbers: ClassVar[tuple[str, ...]]
    """Names of `options`."""

    def __init__(self, name: str, n: int, k: int) -> None:
        super().__init__()
        self.name, self.n, self.k = name, n, k

    def options(self) -> dict[str, Any]:
        """What it was made with beside name, n and k: numbers, for a file."""
        return {name: getattr(self, name) for name in self.numbers}

    @staticmethod
    @abstractmethod
    def shapes(n: int, k: int, options: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        """Of what trains, by its name; `options` are those of a file."""

    @abstractmethod
    def site(self) -> SiteDelta:
        """The same change, for a pool."""


class LoRAXS(Kind):
    """LoRA-XS (arXiv 2405.17604): y = W x + s B R A x, of which only R [r, r] trains.

    A = Sigma V' and B = U of the truncated SVD of W = U Sigma V', shared by all adapters of a base.
    R starts at N(0, 1e-5) as in the authors' code. basis: of all linears of the model, with parts
    "<name>.A" and "<name>.B" (`singular_basis`).
    """

    kind = "lora-xs"
    numbers = ("rank", "scaling")

    def __init__(
        self, name: str, n: int, k: int, *, basis: Basis, scaling: float = 1.0, seed: int = 0
    ) -> None:
        super().__init__(name, n, k)
        require_options(name, n, k, {"scaling": scaling, "seed": seed})
        self.basis, self.scaling = basis, scaling
        self.shared = {role: Shared(basis, f"{name}.{role}") for role in "AB"}
        a, b = (_values(self.shared[role]) for role in "AB")
        self.register_buffer("a", a, persistent=False)
        self.register_buffer("b", b, persistent=False)
        normal = torch.Generator().manual_seed(seed)
        self.rank = len(a)
        self.r = nn.Parameter(1e-5 * torch.randn(len(a), len(a), generator=normal))

    @staticmethod
    def shapes(n: int, k: int, options: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        return {"r": (options["rank"], options["rank"])}

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.get_buffer("a").to(x.dtype), self.get_buffer("b").to(x.dtype)
        return self.scaling * (functional.linear(functional.linear(x, a), self.r.to(x.dtype)) @ b)

    def site(self) -> SiteDelta:
        parts: dict[int, Part] = {A: self.shared["A"], B: self.shared["B"]}
        parts[CORE] = (dense_run(self.r.detach().float()),)
        return SiteDelta(self.name, self.n, self.k, self.scaling, parts)


class NOLA(Kind):
    """NOLA (arXiv 2310.02556): LoRA whose A = A_0 + sum alpha_i A_i and B = sum beta_j B_j.

    A_i and B_j are uniform in (-1, 1) and made anew from a seed whenever they are needed; alpha and
    beta train, from 0, as in the authors' code, where A_0 is Kaiming-uniform and frozen: here
    uniform(seed, count) / sqrt(k), made from the seed, too. A comes from 2 seed, B from 2 seed + 1.
    """

    kind = "nola"
    numbers = ("rank", "count", "seed", "scaling")

    def __init__(
        self, name: str, n: int, k: int, *, rank: int = 8, count: int = 1024, seed: int = 0,
        scaling: float = 1.0,
    ) -> None:  # fmt: skip
        super().__init__(name, n, k)
        self.rank, self.count, self.seed, self.scaling = rank, count, seed, scaling
        require_options(name, n, k, self.options())
        self.alpha = nn.Parameter(torch.zeros(count))
        self.beta = nn.Parameter(torch.zeros(count))

    @staticmethod
    def shapes(n: int, k: int, options: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        return {"alpha": (options["count"],), "beta": (options["count"],)}

    def factors(self) -> tuple[Tensor, Tensor]:
        """A [r, k] and B [n, r], made anew."""
        start = uniform(2 * self.seed, self.count, (self.rank, self.k)) / math.sqrt(self.k)
        a = combination(self.alpha, 2 * self.seed, (self.rank, self.k))
        b = combination(self.beta, 2 * self.seed + 1, (self.n, self.rank))
        return a + start.to(a), b

    def forward(self, x: Tensor) -> Tensor:
        a, b = (factor.to(x.dtype) for factor in self.factors())
        return self.scaling * functional.linear(functional.linear(x, a), b)

    @torch.no_grad()
    def site(self) -> SiteDelta:
        """Plain LoRA: what a pool holds is made once, when it is loaded."""
        a, b = self.factors()
        return dense_site(self.name, a.float(), b.float(), self.scaling)


class MultiLoRA(Kind):
    """MultiLoRA (arXiv 2311.11501): y = W x + sum over i of s_i B_i A_i x, scales and pairs train.

    A and B both start Kaiming-uniform and the scales at 0, so that the start changes nothing. One
    scale per pair: the paper's shape of it could not be verified.
    """

    kind = "multi-lora"
    numbers = ("rank", "count", "seed")

    def __init__(
        self, name: str, n: int, k: int, *, rank: int = 8, count: int = 3, seed: int = 0
    ) -> None:
        super().__init__(name, n, k)
        self.rank, self.count, self.seed = rank, count, seed
        require_options(name, n, k, self.options())
        self.a = nn.Parameter(uniform(seed, 0, (count * rank, k)) / math.sqrt(k))
        self.b = nn.Parameter(uniform(seed, 1, (n, count * rank)) / math.sqrt(rank))
        self.scales = nn.Parameter(torch.zeros(count))

    @staticmethod
    def shapes(n: int, k: int, options: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        rows = options["rank"] * options["count"]
        return {"a": (rows, k), "b": (n, rows), "scales": (options["count"],)}

    def forward(self, x: Tensor) -> Tensor:
        low = functional.linear(x, self.a.to(x.dtype))
        scales = self.scales.to(x.dtype).repeat_interleave(self.rank)
        return functional.linear(low * scales, self.b.to(x.dtype))

    def site(self) -> SiteDelta:
        a, b = self.a.detach().float(), self.b.detach().float()
        scales = self.scales.detach().float().repeat_interleave(self.rank)
        parts: dict[int, Part] = {
            A: (dense_run(a),), B: (dense_run(b.T.contiguous()),),
            DIAGONAL: (dense_run(scales[None]),),
        }  # fmt: skip
        return SiteDelta(self.name, self.n, self.k, 1.0, parts)


KINDS: dict[str, type[Kind]] = {kind.kind: kind for kind in (LoRAXS, NOLA, MultiLoRA)}


def require_options(name: str, n: int, k: int, options: Mapping[str, Any]) -> None:
    """Raise AdapterError for a number that no adapter of a linear [n, k] has."""
    whole = {"rank": (1, max(n, k)), "count": (1, 2**31), "seed": (0, 2**62)}
    largest = sys.float_info.max
    for key, value in options.items():
        low, high = whole.get(key, (-largest, largest))
        types = (int,) if key in whole else (int, float)
        if type(value) not in types or not low <= value <= high:
            wanted = f"a whole number from {low} to {high}" if key in whole else "a finite number"
            raise AdapterError(f"adapter of {name}: its {key} is {value!r}; give {wanted}")


def singular_pair(weight: Tensor, rank: int, name: str = "W") -> tuple[Tensor, Tensor]:
    """A = Sigma V' [r, k] and B' = U' [r, n], float32, of the `rank` largest singular values of W.

    By the eigenvectors of the smaller Gram matrix, in float64; of each u the largest entry is
    positive, so that signs are defined.
    """
    n, k = weight.shape
    if not 1 <= rank <= min(n, k):
        raise AdapterError(f"LoRA-XS of {name}: rank {rank} is not in 1..{min(n, k)}")
    w = weight.double()
    if n <= k:
        u = torch.linalg.eigh(w @ w.T)[1][:, -rank:].flip(1)
    else:
        v = torch.linalg.eigh(w.T @ w)[1][:, -rank:].flip(1)
        u = functional.normalize(w @ v, dim=0)
    peak = u.gather(0, u.abs().argmax(dim=0, keepdim=True))
    u = u * torch.where(peak < 0, -1.0, 1.0)
    return (u.T @ w).float(), u.T.float().contiguous()


def singular_basis(weights: dict[str, Tensor], rank: int) -> Basis:
    """LoRA-XS's frozen factors of all linears of a model, by module name."""
    parts = {}
    for name, weight in weights.items():
        a, b = singular_pair(weight, rank, name)
        parts |= {f"{name}.A": (dense_run(a),), f"{name}.B": (dense_run(b),)}
    return Basis(parts)


def _values(part: Shared) -> Tensor:
    """float32 rows of a dense part."""
    (run,) = part.runs
    return torch.from_numpy(run.planes[0].view("f4").copy())
