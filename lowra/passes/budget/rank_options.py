"""LoRA ranks that compete with row widths for the same stored bits.

What a rank saves is estimated before the final quantization: a site is quantized once with error
feedback, at the widths that the plan without adapters gives it. Let E be the residual, D the rows'
weights (half their sensitivity, or 1) and G = L L' the input metric; rank r then removes the share
f(r) = sum of the r largest s^2 / sum of all s^2, s the singular values of D^1/2 E L. A site that
loses `loss` at its widths loses loss * (1 - f(r)) with rank r.

Approximations: f is taken not to depend on the widths; and within one knapsack, where ranks are
pseudo-rows of 16 (n + k) r bits, what they save is priced at the loss of the plan before. So the
program is solved in turn with the losses of the last plan, and of all plans, the first without
adapters included, the one of least estimated loss is kept. The bound of such a plan is not proven.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from lowra.compiler.errors import BudgetError
from lowra.compiler.facts import Codebooks, Statistics
from lowra.compiler.packing import trellis_runs
from lowra.compiler.program import Program, Site
from lowra.compiler.progress import stage
from lowra.compiler.rotation import Rotation, rotate
from lowra.passes.budget.relaxation import Assignment, Floats, Ints, Rows
from lowra.passes.rounding.feedback import feedback_codes, scale_index
from lowra.passes.rounding.moments import MomentsReader
from lowra.passes.rounding.quantizer import row_tables

ROUNDS = 3
"""Solutions with ranks after the first without."""


def solve_with_ranks(
    program: Program, rows: Rows, budget: int, ranks: Sequence[int], seconds: float
) -> tuple[Assignment, tuple[int, ...]]:
    """Widths of all rows and a rank per site under one budget of bits.

    The assignment's `cost` is the expected loss left with adapters, its `bits` include them, and
    its `bound` is 0: nothing is proven about the joint program.
    """
    from lowra.passes.budget.solver import solve_knapsack

    plan = solve_knapsack(rows.cost, rows.bits, budget, groups=rows.groups, seconds=seconds)
    shares = residual_shares(program, plan.choice, ranks)
    bits = np.array([[_rank_bits(s, rank) for rank in ranks] for s in program.sites])
    site_of = np.repeat(np.arange(len(program.sites)), [site.n for site in program.sites])
    best, best_ranks = plan, (0,) * len(program.sites)
    current = plan
    for _ in range(ROUNDS):
        lost = _site_losses(rows, current.choice, site_of)
        try:
            current, chosen = _joint(rows, budget, shares * lost[:, None], bits, site_of, seconds)
        except BudgetError:
            break
        kept = _site_losses(rows, current.choice, site_of)
        sites = np.arange(len(chosen))
        cost = float((kept * (1 - shares[sites, chosen])).sum())
        if cost >= best.cost:
            break
        total = current.bits + int(bits[sites, chosen].sum())
        best = Assignment(current.choice, cost, total, 0.0, current.price)
        best_ranks = tuple(
            min(ranks[c], s.n, s.k) for c, s in zip(chosen, program.sites, strict=True)
        )
    return best, best_ranks


def _rank_bits(site: Site, rank: int) -> int:
    return 16 * min(rank, site.n, site.k) * (site.n + site.k)


def _site_losses(rows: Rows, choice: Ints, site_of: Ints) -> Floats:
    lost = np.bincount(site_of, rows.cost[np.arange(len(choice)), choice])
    return lost.astype(np.float64)


def _joint(
    rows: Rows, budget: int, saved: Floats, bits: Ints, site_of: Ints, seconds: float
) -> tuple[Assignment, Ints]:
    """One knapsack of rows and, per site, a pseudo-row whose options are ranks.

    saved, bits: [sites, ranks]. A pseudo-row costs what the largest saving exceeds its own by.
    """
    from lowra.passes.budget.solver import solve_knapsack

    count, width = len(rows.cost), max(rows.cost.shape[1], saved.shape[1])
    cost = np.full((count + len(saved), width), np.inf)
    size = np.zeros(cost.shape, dtype=np.int64)
    cost[:count, : rows.cost.shape[1]], size[:count, : rows.bits.shape[1]] = rows.cost, rows.bits
    cost[count:, : saved.shape[1]] = saved.max(axis=1, keepdims=True) - saved
    size[count:, : bits.shape[1]] = bits
    groups = None
    if rows.groups is not None:
        groups = np.concatenate([rows.groups, -1 - np.arange(len(saved))])
    both = solve_knapsack(cost, size, budget, groups=groups, seconds=seconds)
    choice, chosen = both.choice[:count], both.choice[count:]
    spent = int(rows.bits[np.arange(count), choice].sum())
    loss = float(rows.cost[np.arange(count), choice].sum())
    return replace(both, choice=choice, cost=loss, bits=spent), chosen


def residual_shares(program: Program, choice: Ints, ranks: Sequence[int]) -> Floats:
    """f(r) of every site and rank, float64 [sites, ranks], at the widths of `choice` [rows]."""
    ends = np.cumsum([site.n for site in program.sites])[:-1]
    moments = MomentsReader(program)
    shares: list[list[float]] = []
    with stage("ranks", len(program.sites)) as bar:
        for site, picked in zip(program.sites, np.split(choice, ends), strict=True):
            squares = _squared_values(program, site, picked, moments)
            total = float(squares.sum()) or 1.0
            shares.append([float(squares[: max(rank, 0)].sum()) / total for rank in ranks])
            bar.advance()
    return np.array(shares)


def _squared_values(
    program: Program, site: Site, picked: Ints, reader: MomentsReader
) -> torch.Tensor:
    """Squared singular values of D^1/2 E L, largest first, of a quantization with feedback."""
    books = program.fact(site.name, Codebooks)
    weight = rotate(program.weight(site), program.fact(site.name, Rotation))
    moments = reader.read(site)
    ids = torch.tensor(books.ids, dtype=torch.uint8)[torch.from_numpy(picked)]
    tables, scales = row_tables(books, ids)
    codes = feedback_codes(weight, moments.factor, tables, scales, books.group, trellis_runs(ids))
    value = tables.gather(1, codes)
    if scales is not None:
        value = value * scales[:, scale_index(site.k, books.group)]
    error = weight - value
    sensitivity = program.fact(site.name, Statistics).sensitivity
    if sensitivity is not None:
        error = error * sensitivity.load().sqrt().unsqueeze(1)
    error = error / (float(error.abs().max()) or 1.0)
    if site.n <= site.k:
        square = error @ moments.gram @ error.T
    else:
        image = error @ torch.linalg.cholesky(moments.gram)
        square = image.T @ image
    return torch.linalg.eigvalsh(square).flip(0).clamp_min(0).double()
