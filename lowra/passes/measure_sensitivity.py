"""measure-sensitivity: how much the model's loss minds an error in each output row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, fx, nn

from lowra.compiler.facts import Statistics
from lowra.compiler.pipeline import Pass
from lowra.compiler.program import Program
from lowra.compiler.progress import stage
from lowra.compiler.spill import StoredTensor, write_tensors

WINDOW = 256
"""Tokens per backward pass: bounds the memory of its activations."""


@dataclass(frozen=True)
class MeasureSensitivity(Pass):
    """Per output row j, E[g_j^2] with g the gradient of the next-token loss (GuidedQuant,
    arXiv 2505.07004).

    The loss then rises by about sum_j E[g_j^2] (w_j - w^_j)' G (w_j - w^_j) / 2. Gradients stop at
    the linears' outputs, so no weight gradient is ever formed; at most `tokens` calibration tokens
    are used, in windows of 256. Programs that are no causal language model, and data-free ones, are
    left as they are.
    """

    name: ClassVar[str] = "measure-sensitivity"
    reads: ClassVar = (Statistics,)
    writes: ClassVar = (Statistics,)
    tokens: int = 2048

    def run(self, program: Program) -> Program:
        windows = self._windows(program)
        if not windows:
            return program
        first = program.fact(program.sites[0].name, Statistics)
        assert first.gram is not None
        names = (site.name for site in program.sites)
        path = program.spill.path(repr(self), program.fingerprint, first.gram.path.name, *names)
        if not path.exists():
            write_tensors(_mean_squares(program, windows), path)
        return program.with_facts(
            {
                site.name: [
                    replace(
                        program.fact(site.name, Statistics),
                        sensitivity=StoredTensor(path, site.name),
                    )
                ]
                for site in program.sites
            }
        )

    def _windows(self, program: Program) -> list[Tensor]:
        """Token ids [1, <= 256] to measure on; none where the program has no next-token loss."""
        if program.graph is None or not program.causal or program.inputs[:1] != ("input_ids",):
            return []
        if not program.calibration:
            return []
        rows = [window for batch in program.calibration for window in batch[0]]
        parts = [part for window in rows for part in window.split(WINDOW) if len(part) > 1]
        step = max(1, -(-len(parts) * WINDOW // self.tokens))
        return [part.unsqueeze(0) for part in parts[::step]]


def _mean_squares(program: Program, windows: Sequence[Tensor]) -> dict[str, Tensor]:
    sums: dict[str, Tensor] = {s.name: torch.zeros(s.n) for s in program.sites}
    runner = _Watched(program, sums)
    tokens = 0
    with stage("sensitivity", len(windows)) as bar, torch.enable_grad():
        for ids in windows:
            extra = [torch.ones_like(ids) for _ in program.inputs[1:]]
            logits = runner.run(ids, *extra)
            loss = nn.functional.cross_entropy(logits[0, :-1].float(), ids[0, 1:], reduction="sum")
            loss.backward()
            tokens += ids.numel()
            bar.advance()
    return {name: total / tokens for name, total in sums.items()}


class _Watched(fx.Interpreter):
    """Runs a program; on the way back, adds squared gradients of each site's outputs to `sums`."""

    def __init__(self, program: Program, sums: Mapping[str, Tensor]) -> None:
        frozen = {name: tensor.detach() for name, tensor in program.tensors.items()}
        super().__init__(replace(program, tensors=frozen).module())
        self.sums = sums
        self.sites = {node: site.name for site in program.sites for node in site.nodes}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.name in self.sites:
            total = self.sums[self.sites[n.name]]
            value = value if value.requires_grad else value.requires_grad_()
            value.register_hook(lambda grad: _add_squares(total, grad))
        return value


def _add_squares(total: Tensor, grad: Tensor) -> None:
    total += grad.detach().float().square().reshape(-1, grad.shape[-1]).sum(0)
