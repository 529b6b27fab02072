"""Low-rank factors in other bases: the SVD of B A from its factors, and a rotation of the rank."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lowra.compiler.errors import AdapterError
from lowra.compiler.rotation import largest_block, signs


@dataclass(frozen=True)
class LowRank:
    """LoRA factors of one site as they come in: y += scaling * B A x.

    a: [r, k]; b: [n, r]; floating, checked on construction. name: the module's, without PEFT's
    prefix. Raises AdapterError for shapes that do not meet, and for NaN and infinity.
    """

    name: str
    a: Tensor
    b: Tensor
    scaling: float

    def __post_init__(self) -> None:
        a, b = list(self.a.shape), list(self.b.shape)
        if len(a) != 2 or len(b) != 2 or 0 in (*a, *b):
            raise AdapterError(
                f"adapter of {self.name}: lora_A {a} and lora_B {b} are not matrices [r, k] and "
                "[n, r]; only adapters of linears can be compressed"
            )
        if a[0] != b[1]:
            raise AdapterError(
                f"adapter of {self.name}: lora_A {a} has rank {a[0]}, lora_B {b} has rank {b[1]}; "
                "both must come from one training run"
            )
        for role, tensor in (("lora_A", self.a), ("lora_B", self.b)):
            if not tensor.is_floating_point():
                raise AdapterError(f"{role} of {self.name} is {tensor.dtype}, not floating point")
            if not bool(torch.isfinite(tensor).all()):
                count = int((~torch.isfinite(tensor)).sum())
                raise AdapterError(
                    f"{role} of {self.name} holds {count} values that are NaN or infinite; the "
                    "training diverged, use an earlier checkpoint of it"
                )
        if not math.isfinite(self.scaling):
            raise AdapterError(f"adapter of {self.name}: its scaling is {self.scaling}")

    @property
    def n(self) -> int:
        return self.b.shape[0]

    @property
    def k(self) -> int:
        return self.a.shape[1]

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    @property
    def parameters(self) -> int:
        return self.rank * (self.n + self.k)


@dataclass(frozen=True)
class Directions:
    """B A as a sum of r outer products b_i a_i.

    b: float32 [r, n], column i of B' as row i. a: float32 [r, k]. sigma: float32 [r], the singular
    values of B A where the directions are singular ones, largest first; else |b_i| |a_i|.
    """

    b: Tensor
    a: Tensor
    sigma: Tensor

    @property
    def rank(self) -> int:
        return self.a.shape[0]


def balanced(factors: LowRank) -> Directions:
    """B' = U S^1/2 and A' = S^1/2 V' with B A = U S V' (LoRAQuant, arXiv 2510.26690, section 3).

    From B = Q_b R_b and A' = Q_a R_a the SVD of the r x r core R_b R_a' gives that of B A, so the
    dense [n, k] product is never made: O((n + k) r^2). In float64; r is at most min(n, k), since
    B A has no more directions. Each b_i has its largest entry positive, so signs are defined.
    """
    q_b, r_b = torch.linalg.qr(factors.b.double())
    q_a, r_a = torch.linalg.qr(factors.a.double().T)
    u, sigma, vh = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    root = sigma.sqrt()
    b, a = (q_b @ u * root).T, (q_a @ vh.T * root).T
    peak = b.gather(1, b.abs().argmax(dim=1, keepdim=True))
    sign = torch.where(peak < 0, -1.0, 1.0).double()
    found = Directions(*((x).float().contiguous() for x in (b * sign, a * sign, sigma)))
    for name, tensor in (("lora_B", found.b), ("lora_A", found.a)):
        if not bool(torch.isfinite(tensor).all()):
            raise AdapterError(f"{name} of {factors.name} is too large for float32 once balanced")
    return found


def spread(directions: Directions) -> Directions:
    """The same product in a basis where every direction carries alike: B' R and R' A'.

    Any orthogonal R [r, r] leaves B' R R' A' as it is, and nothing of R is needed to use the
    result. R = D H with signs D and H all of one magnitude where r is a power of two (Sylvester),
    else the Hartley matrix cas(2 pi i j / r) / sqrt(r), whose squares lie in [0, 2 / r].
    """
    r = directions.rank
    if r == 1:
        return directions
    mixer = _hartley(r) if largest_block(r) < r else _sylvester(r)
    mixer = signs(0, r)[:, None] * mixer
    b, a = (mixer.T @ x.double() for x in (directions.b, directions.a))
    sigma = b.norm(dim=1) * a.norm(dim=1)
    return Directions(b.float(), a.float(), sigma.float())


def _sylvester(size: int) -> Tensor:
    h = torch.ones(1, 1, dtype=torch.float64)
    while h.shape[0] < size:
        h = torch.cat((torch.cat((h, h), 1), torch.cat((h, -h), 1)))
    return h / math.sqrt(size)


def _hartley(size: int) -> Tensor:
    place = torch.arange(size)
    angle = 2 * math.pi * (place[:, None] * place % size).double() / size
    return (angle.cos() + angle.sin()) / math.sqrt(size)


def energy(directions: Directions) -> float:
    """|B A|_F^2 from the two r x r Gram matrices."""
    return float(((directions.b @ directions.b.T) * (directions.a @ directions.a.T)).sum())


def relative_error(directions: Directions, b: Tensor, a: Tensor) -> float:
    """|B A - B^ A^|_F^2 / |B A|_F^2 for B^ [n, r] transposed and A^; 0 for a zero product.

    By Gram matrices of the 2r directions B, B^ and A, -A^, in float64: exact to about 1e-14 of the
    energy, so errors are good down to there.
    """
    left = torch.cat((directions.b, b)).double()
    right = torch.cat((directions.a, -a)).double()
    lost = float(((left @ left.T) * (right @ right.T)).sum())
    whole = energy(directions)
    return max(lost, 0.0) / whole if whole else 0.0
