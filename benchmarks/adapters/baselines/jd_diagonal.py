"""JD-Diagonal (Compress then Serve, arXiv 2407.00066): one basis for several adapters."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from benchmarks.adapters.baselines.compressed import HALF, Compressed
from lowra.adapters.factors import LowRank

ITERATIONS = 40


def jd_diagonal(adapters: Sequence[Sequence[LowRank]], rank: int) -> list[Compressed]:
    """Every adapter as U diag(s_i) V' with U [n, rank] and V [k, rank] of each site shared.

    Stored in 16 bits: U and V, of which every adapter is charged its share, and `rank` numbers and
    a norm for each adapter and site.
    """
    kept: list[dict[str, tuple[Tensor, Tensor]]] = [{} for _ in adapters]
    bits = 0.0
    for site in zip(*adapters, strict=True):
        u, v, cores = diagonalised(site, rank)
        for factors, one, core in zip(kept, site, cores, strict=True):
            factors[one.name] = (v.T.contiguous(), u * core)
        bits += HALF * (rank * (site[0].n + site[0].k) / len(adapters) + rank + 1)
    return [Compressed(factors, bits) for factors in kept]


def diagonalised(site: Sequence[LowRank], rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """U, V and cores [adapters, rank] of sum_i |D_i / |D_i| - U diag(s_i) V'|^2, by turns in closed
    form; cores carry the norms |D_i| again, so that B_i A_i ~ U diag(core) V'."""
    pairs = [(one.b.double(), one.a.double()) for one in site]
    norms = [float(((b.T @ b) * (a @ a.T)).sum().clamp_min(1e-30).sqrt()) for b, a in pairs]
    pairs = [(b / norm, a) for (b, a), norm in zip(pairs, norms, strict=True)]
    u, v = _start(pairs, rank)
    cores = _cores(pairs, u, v)
    for _ in range(ITERATIONS):
        u = _half_step([(b, a @ v) for b, a in pairs], v, cores)
        v = _half_step([(a.T, b.T @ u) for b, a in pairs], u, cores)
        cores = _cores(pairs, u, v)
    u, v = u.half().double(), v.half().double()
    whole = _cores(pairs, u, v) * torch.tensor(norms).double()[:, None]
    return u.float(), v.float(), whole.half().float()


def _start(pairs: list[tuple[Tensor, Tensor]], rank: int) -> tuple[Tensor, Tensor]:
    """The leading singular directions of all adapters, side by side."""
    found = []
    for b, a in pairs:
        q, r = torch.linalg.qr(b)
        left, sigma, right = torch.linalg.svd(r @ a, full_matrices=False)
        found += [(float(s), q @ left[:, i], right[i]) for i, s in enumerate(sigma)]
    found = sorted(found, key=lambda item: -item[0])[:rank]
    if len(found) < rank:
        raise ValueError(f"rank {rank} of the basis is above the {len(found)} of the adapters")
    return torch.stack([u for _, u, _ in found], 1), torch.stack([v for *_, v in found], 1)


def _cores(pairs: list[tuple[Tensor, Tensor]], u: Tensor, v: Tensor) -> Tensor:
    """s_i = (U'U . V'V)^-1 diag(U' D_i V), a Hadamard product."""
    both = (u.T @ u) * (v.T @ v)
    wanted = torch.stack([((u.T @ b) * (a @ v).T).sum(1) for b, a in pairs], 1)
    return (torch.linalg.pinv(both, hermitian=True) @ wanted).T


def _half_step(sides: list[tuple[Tensor, Tensor]], other: Tensor, cores: Tensor) -> Tensor:
    """U = (sum_i D_i V S_i) (sum_i S_i V'V S_i)^-1, or V likewise; `sides` are D_i V as factors."""
    gram = other.T @ other
    left = sum((b @ right) * s for (b, right), s in zip(sides, cores, strict=True))
    whole = sum(gram * torch.outer(s, s) for s in cores)
    assert isinstance(left, Tensor) and isinstance(whole, Tensor)
    return left @ torch.linalg.pinv(whole, hermitian=True)
