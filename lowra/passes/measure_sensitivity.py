"""measure-sensitivity: how much the model's loss minds an error in each output row."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, fx, nn

from lowra.compiler.errors import CalibrationError, RecipeError
from lowra.compiler.facts import Statistics, TokenWeights
from lowra.compiler.pipeline import Pass
from lowra.compiler.program import Program
from lowra.compiler.progress import stage
from lowra.compiler.spill import StoredTensor, stored_names, write_tensors
from lowra.passes.rounding.guidance import row_groups

log = logging.getLogger("lowra")

WINDOW = 256
"""Tokens per backward pass: bounds the memory of its activations."""

THIN = 10
"""Effective tokens per input below which a weighted Gram matrix is called thin."""


@dataclass(frozen=True)
class MeasureSensitivity(Pass):
    """Per output row j, E[g_j^2] with g the gradient of the next-token loss (GuidedQuant,
    arXiv 2505.07004).

    The loss then rises by about sum_j E[g_j^2] (w_j - w^_j)' G (w_j - w^_j) / 2. Gradients stop at
    the linears' outputs, so no weight gradient is ever formed; at most `tokens` calibration tokens
    are used, in windows of 256. Programs that are no causal language model, and data-free ones, are
    left as they are.
    groups, power: with groups > 0 every calibration token is used, and per site and group of rows
    the weight of each token is kept too: the mean of g_j^2 over the group's rows, to the `power`
    (GuidedQuant's own is 1, which leaves a few tokens the say over most inputs; 0.5 loses less of
    the sample). A program without a next-token loss is then refused.
    """

    name: ClassVar[str] = "measure-sensitivity"
    reads: ClassVar = (Statistics,)
    writes: ClassVar = (Statistics,)
    tokens: int = 2048
    groups: int = 0
    power: float = 0.5

    def require(self, program: Program) -> None:
        if self.groups < 0 or self.power <= 0:
            raise RecipeError(
                f"groups={self.groups} and power={self.power}: token weights need 0 or more groups "
                "of rows, and a positive power"
            )
        if self.groups and not self._windows(program):
            why = "this program has no calibration data" if not program.calibration else (
                "this program is no traced causal language model"
            )  # fmt: skip
            raise CalibrationError(
                f"guided quantization weighs tokens by the next-token loss, and {why}: use guided=0"
            )

    def run(self, program: Program) -> Program:
        self.require(program)
        windows = self._windows(program)
        if not windows:
            return program
        first = program.fact(program.sites[0].name, Statistics)
        assert first.gram is not None
        names = (site.name for site in program.sites)
        path = program.spill.path(repr(self), program.fingerprint, first.gram.path.name, *names)
        if not path.exists():
            weights = self._empty_weights(program)
            found = _mean_squares(program, windows, weights)
            write_tensors(found | _normalized(weights, self.power), path)
        facts: dict[str, list[object]] = {
            site.name: [
                replace(
                    program.fact(site.name, Statistics), sensitivity=StoredTensor(path, site.name)
                )
            ]
            for site in program.sites
        }
        guides = self._guides(program, path)
        return program.with_facts(facts).with_facts({n: [guide] for n, guide in guides.items()})

    def _empty_weights(self, program: Program) -> dict[str, Tensor]:
        """float32 [groups, tokens] per site that is used once, to be filled."""
        tokens = sum(batch[0].numel() for batch in program.calibration)
        return {
            site.name: torch.zeros(min(self.groups, site.n), tokens)
            for site in program.sites
            if self.groups and len(site.nodes) == 1
        }

    def _guides(self, program: Program, path: Path) -> dict[str, TokenWeights]:
        """The token weights of the sites that have any; what is doubtful about them is logged."""
        if not self.groups:
            return {}
        names = stored_names(path)
        guides: dict[str, TokenWeights] = {}
        for site in program.sites:
            if _tokens_key(site.name) in names:
                weights = StoredTensor(path, _tokens_key(site.name))
                values = weights.load()
                guides[site.name] = TokenWeights(weights, len(values), _effective(values))
        _warn(program, guides)
        return guides

    def _windows(self, program: Program) -> list[tuple[int, Tensor]]:
        """Token ids [1, <= 256] to measure on, and the place of the first among all calibration
        tokens; none where the program has no next-token loss."""
        if program.graph is None or not program.causal or program.inputs[:1] != ("input_ids",):
            return []
        if not program.calibration:
            return []
        rows = [window for batch in program.calibration for window in batch[0]]
        parts: list[tuple[int, Tensor]] = []
        start = 0
        for part in (part for window in rows for part in window.split(WINDOW)):
            if len(part) > 1:
                parts.append((start, part.unsqueeze(0)))
            start += len(part)
        step = 1 if self.groups else max(1, -(-len(parts) * WINDOW // self.tokens))
        return parts[::step]


def _mean_squares(
    program: Program, windows: Sequence[tuple[int, Tensor]], weights: dict[str, Tensor]
) -> dict[str, Tensor]:
    """The sensitivity [n] of each site; `weights` [groups, tokens] get the mean squares of their
    rows at each token, and lose the sites whose outputs are not one per token."""
    sums: dict[str, Tensor] = {s.name: torch.zeros(s.n) for s in program.sites}
    runner = _Watched(program, sums, weights)
    tokens = 0
    with stage("sensitivity", len(windows)) as bar, torch.enable_grad():
        for runner.start, ids in windows:
            extra = [torch.ones_like(ids) for _ in program.inputs[1:]]
            runner.tokens = ids.numel()
            logits = runner.run(ids, *extra)
            loss = nn.functional.cross_entropy(logits[0, :-1].float(), ids[0, 1:], reduction="sum")
            loss.backward()
            tokens += ids.numel()
            bar.advance()
    return {name: total / tokens for name, total in sums.items()}


def _tokens_key(site: str) -> str:
    return f"{site}/tokens"


def _normalized(weights: Mapping[str, Tensor], power: float) -> dict[str, Tensor]:
    """Mean squares [groups, tokens] as weights of mean one; ones where no token has a gradient."""
    found: dict[str, Tensor] = {}
    for name, squares in weights.items():
        raised = squares.double() ** power
        mean = raised.mean(1, keepdim=True)
        if not bool(torch.isfinite(mean).all()):
            raise CalibrationError(
                f"the gradient at {name} is not finite on the calibration data; run the model in "
                "bfloat16 or float32, or check the data"
            )
        found[_tokens_key(name)] = torch.where(mean > 0, raised / mean, 1.0).float()
    return found


def _effective(weights: Tensor) -> float:
    """The least (sum w)^2 / sum w^2 of the groups in [groups, tokens]."""
    weights = weights.double()
    return float((weights.sum(1) ** 2 / weights.square().sum(1)).min())


def _warn(program: Program, guides: Mapping[str, TokenWeights]) -> None:
    plain = [site.name for site in program.sites if site.name not in guides]
    if plain:
        log.warning(
            "no token weights for %d of %d sites, whose weight is used several times or whose "
            "outputs are not one per token (%s): they are quantized in the plain metric",
            len(plain), len(program.sites), plain[0],
        )  # fmt: skip
    thin = [s for s in program.sites if s.name in guides and guides[s.name].effective < THIN * s.k]
    if thin:
        worst = min(thin, key=lambda site: guides[site.name].effective / site.k)
        log.warning(
            "token weights leave %d of %d sites fewer than %d effective tokens per input "
            "(%s: %.0f for %d inputs): more calibration_tokens would help",
            len(thin), len(program.sites), THIN, worst.name, guides[worst.name].effective, worst.k,
        )  # fmt: skip


class _Watched(fx.Interpreter):
    """Runs a program; on the way back, adds squared gradients of each site's outputs to `sums`, and
    writes their means over groups of rows into `weights`, from column `start` on."""

    start: int = 0

    def __init__(
        self, program: Program, sums: Mapping[str, Tensor], weights: dict[str, Tensor]
    ) -> None:
        frozen = {name: tensor.detach() for name, tensor in program.tensors.items()}
        super().__init__(replace(program, tensors=frozen).module())
        self.sums, self.weights = sums, weights
        self.tokens = 0
        self.sites = {node: site.name for site in program.sites for node in site.nodes}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.name in self.sites:
            name = self.sites[n.name]
            value = value if value.requires_grad else value.requires_grad_()
            value.register_hook(lambda grad: self._add(name, grad))
        return value

    def _add(self, name: str, grad: Tensor) -> None:
        squares = grad.detach().float().square().reshape(-1, grad.shape[-1])
        self.sums[name].add_(squares.sum(0))
        weights = self.weights.get(name)
        if weights is None:
            return
        if len(squares) != self.tokens:
            del self.weights[name]
            return
        place = weights[:, self.start : self.start + self.tokens]
        for index, rows in enumerate(row_groups(squares.shape[1], len(weights))):
            place[index] = squares[:, rows].mean(1)
