"""The training of one block: what is trained, how it steps, and which state is kept."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lowra.compiler.blocks import Block
from lowra.compiler.facts import Packed, Prefix
from lowra.compiler.program import Program, Site
from lowra.compiler.progress import Stage
from lowra.compiler.rotation import Rotation, rotate
from lowra.compiler.storage import PackedWeight
from lowra.passes.rounding.moments import InputMoments, MomentsReader, moments_of_prefix
from lowra.passes.rounding.panels import rotated_values
from lowra.passes.tuning.batches import held_out, shuffled
from lowra.passes.tuning.block_runner import BlockRunner, Linears, Product, Values, product
from lowra.passes.tuning.latents import LatentWeight, wanted_values

CHECKS = 2
"""How often the held-out error is measured in the course of a block's training."""


@dataclass(frozen=True)
class BlockTask:
    """A block, the values before it (quantized prefix), the original's behind it, by batch.

    The last `held_out` batches only judge.
    """

    program: Program
    block: Block
    runner: BlockRunner
    kept: list[Values]
    follow: list[Values]

    @property
    def held_out(self) -> int:
        return held_out(len(self.kept))


def vectors_of(task: BlockTask) -> tuple[str, ...]:
    """The one-dimensional parameters (norms, biases) that this block alone reads."""
    inside, tensors = set(task.block.nodes), task.program.tensors
    found: dict[str, bool] = {}
    for node in task.runner.nodes.values():
        if node.op != "get_attr":
            continue
        name, users = str(node.target), {user.name for user in node.users}
        found[name] = found.get(name, True) and users <= inside
    return tuple(
        name for name, alone in found.items()
        if alone and isinstance(tensors[name], nn.Parameter) and tensors[name].dim() == 1
    )  # fmt: skip


class _Trainee:
    """The block's weights and vectors in training."""

    def __init__(self, task: BlockTask) -> None:
        self.task = task
        program = task.program
        moments = MomentsReader(program)
        self.weights: dict[str, LatentWeight] = {}
        for site in task.block.sites:
            packed = program.fact(site.name, Packed).weight
            metric = _metric(program, moments, site)
            weight = metric.target(rotate(program.weight(site), packed.rotation))
            wanted = wanted_values(weight, rotated_values(packed), metric.gram)
            self.weights[site.name] = LatentWeight(packed, wanted)
        self.starts = {name: program.tensors[name].detach().float() for name in vectors_of(task)}
        self.units = {n: t.square().mean().sqrt().clamp_min(1e-3) for n, t in self.starts.items()}
        self.offsets = {n: torch.zeros_like(t).requires_grad_() for n, t in self.starts.items()}

    def tensors(self) -> dict[str, Tensor]:
        old = self.task.program.tensors
        return {
            name: (start + self.units[name] * self.offsets[name]).to(old[name].dtype)
            for name, start in self.starts.items()
        }

    def loss(self, index: int) -> Tensor:
        linears: dict[str, tuple[Product, Rotation]] = {}
        for site in self.task.block.sites:
            latent = self.weights[site.name]
            pair = (product(latent.weight(site.dtype)), latent.packed.rotation)
            linears |= dict.fromkeys(site.nodes, pair)
        return block_error(self.task, index, linears, self.tensors())

    def stored(self) -> tuple[dict[str, PackedWeight], dict[str, Tensor]]:
        packed = {name: latent.stored() for name, latent in self.weights.items()}
        return packed, {name: t.detach() for name, t in self.tensors().items()}


def _metric(program: Program, reader: MomentsReader, site: Site) -> InputMoments:
    """The moments that the site was quantized for: behind the quantized prefix if there are any."""
    prefix = program.find(site.name, Prefix)
    if prefix is None:
        return reader.read(site)
    return moments_of_prefix(prefix, program.fact(site.name, Rotation))


def block_error(
    task: BlockTask, index: int, linears: Linears, tensors: Mapping[str, Tensor]
) -> Tensor:
    """Mean over tokens of |y - target|^2 / |target|^2 on one batch."""
    values = task.runner.run(task.block.nodes, task.kept[index], linears, tensors)
    got, wanted = values[task.block.exit].float(), task.follow[index][task.block.exit].float()
    energy = wanted.square().sum(-1).clamp_min(1e-12)
    return ((got - wanted).square().sum(-1) / energy).mean()


@torch.no_grad()
def held_out_error(
    task: BlockTask, packed: Mapping[str, PackedWeight], tensors: Mapping[str, Tensor]
) -> float:
    """The mean error over the held-out batches, with weights as stored."""
    linears: dict[str, tuple[Product, Rotation]] = {}
    for site in task.block.sites:
        stored = packed[site.name]
        pair = (product(rotated_values(stored, site.dtype)), stored.rotation)
        linears |= dict.fromkeys(site.nodes, pair)
    count = len(task.kept)
    indices = range(count - task.held_out, count)
    return math.fsum(float(block_error(task, i, linears, tensors)) for i in indices) / len(indices)


def train_block(
    task: BlockTask, steps: int, rate: float, fine_rate: float, seed: int, bar: Stage
) -> dict[str, Tensor]:
    """Tensors of the best state: `site/role`, `tensor/name`, and `errors` [before, after]."""
    start = {s.name: task.program.fact(s.name, Packed).weight for s in task.block.sites}
    first = held_out_error(task, start, {})
    best: tuple[float, dict[str, PackedWeight], dict[str, Tensor]] = (first, start, {})
    with torch.enable_grad():
        trainee = _Trainee(task)
        optimizer = _optimizer(trainee, fine_rate)
        order = shuffled(len(task.kept) - task.held_out, steps, seed)
        checks = {steps * (i + 1) // CHECKS for i in range(CHECKS)}
        for step, index in enumerate(order, start=1):
            share = _schedule(step, steps)
            trainee.loss(index).backward()
            _move(trainee, 2 * rate / steps * share)
            for group in optimizer.param_groups:
                group["lr"] = fine_rate * share
            optimizer.step()
            optimizer.zero_grad()
            bar.advance()
            if step in checks:
                now = trainee.stored()
                error = held_out_error(task, *now)
                if error < best[0]:
                    best = (error, *now)
    error, packed, tensors = best
    made = {f"{n}/{role}": t for n, w in packed.items() for role, t in w.tensors().items()}
    made |= {f"tensor/{name}": tensor for name, tensor in tensors.items()}
    return made | {"errors": torch.tensor([first, error], dtype=torch.float64)}


def _optimizer(trainee: _Trainee, rate: float) -> torch.optim.Optimizer:
    offsets = list(trainee.offsets.values())
    for weight in trainee.weights.values():
        levels, scales = weight.offsets()
        offsets += [*levels, *scales]
    return torch.optim.Adam(offsets, lr=rate, betas=(0.9, 0.95))


def _schedule(step: int, steps: int) -> float:
    """From one down to nothing in a straight line, so that all steps together make steps / 2."""
    return 1 - (step - 1) / steps


@torch.no_grad()
def _move(trainee: _Trainee, distance: float) -> None:
    """Every latent against the sign of its gradient, by `distance` of its row's spacing."""
    for weight in trainee.weights.values():
        for latents, spacing in weight.latents():
            assert latents.grad is not None
            latents.sub_(latents.grad.sign_().mul_(spacing * distance))
            latents.grad = None
