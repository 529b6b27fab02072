"""tune-blocks: learned rounding, block by block, against the original block's output."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from lowra.compiler.blocks import Block
from lowra.compiler.facts import BlockTuning, Packed, Statistics
from lowra.compiler.pipeline import Pass
from lowra.compiler.program import Program
from lowra.compiler.progress import Stage, stage
from lowra.compiler.rotation import Rotation
from lowra.compiler.storage import from_tensors
from lowra.passes.rounding.moments import output_error
from lowra.passes.rounding.panels import rotated_values
from lowra.passes.tuning.batches import (
    data_fingerprint,
    split_batches,
    tunable_blocks,
    with_tensors,
)
from lowra.passes.tuning.block_runner import (
    BlockRunner,
    Linears,
    Product,
    Values,
    product,
    run_frozen,
)
from lowra.passes.tuning.block_training import BlockTask, train_block


@dataclass(frozen=True)
class TuneBlocks(Pass):
    """Train codes, levels, scales, norms and biases of one block after the other.

    Each block is fed what the quantized blocks before it give, and follows what the original block
    gives on the original's activations. The error is that of the block's output per token, relative
    to the token's energy. It is judged on held-out batches, and a block whose error would rise is
    left as it was. `steps` steps of `batch_tokens` tokens per block; `rate` is how far all steps
    together may move a latent, in distances between levels; `fine_rate` is Adam's, for levels,
    scales (relative) and one-dimensional parameters (relative to their size). Finished blocks are
    kept in the spill folder.
    """

    name: ClassVar[str] = "tune-blocks"
    reads: ClassVar = (Rotation, Statistics, Packed)
    writes: ClassVar = (Packed, BlockTuning)
    steps: int = 40
    batch_tokens: int = 1024
    rate: float = 0.3
    fine_rate: float = 0.001
    seed: int = 0

    def require(self, program: Program) -> None:
        tunable_blocks(program)
        split_batches(program, self.batch_tokens)

    def run(self, program: Program) -> Program:
        blocks = tunable_blocks(program)
        batches = split_batches(program, self.batch_tokens)
        key = (repr(self), program.fingerprint, data_fingerprint(program, batches))
        paths = [program.spill.path(*key, str(i), block.name) for i, block in enumerate(blocks)]
        runner = BlockRunner(program)
        finished = all(path.exists() for path in paths)
        kept = [] if finished else _before(runner, blocks[0], batches)
        original = [dict(values) for values in kept]
        with stage("tune blocks", len(blocks) * (self.steps + 1)) as bar:
            for index, block in enumerate(blocks):
                follow = run_frozen(runner, block.nodes, original, tensors=program.replaced)
                task = BlockTask(program, block, runner, kept, follow)
                stored = program.spill.tensors(
                    (*key, str(index), block.name), functools.partial(self._tune, task, bar)
                )
                program = _with_stored(program, block, stored)
                bar.advance()
                linears, tensors = frozen_block(program, block) if kept else ({}, {})
                kept = run_frozen(runner, block.nodes, kept, linears, tensors)
                original = follow
        return program

    def _tune(self, task: BlockTask, bar: Stage) -> dict[str, Tensor]:
        return train_block(task, self.steps, self.rate, self.fine_rate, self.seed, bar)


def _before(
    runner: BlockRunner, first: Block, batches: Sequence[tuple[Tensor, ...]]
) -> list[Values]:
    """The values alive where the first block begins."""
    names = list(runner.nodes)
    stem = names[: names.index(first.nodes[0])]
    return run_frozen(runner, stem, [runner.inputs(batch) for batch in batches])


def frozen_block(program: Program, block: Block) -> tuple[Linears, dict[str, Tensor]]:
    """The block's linears with weights as stored; and the tensors changed."""
    linears: dict[str, tuple[Product, Rotation]] = {}
    for site in block.sites:
        packed = program.fact(site.name, Packed).weight
        pair = (product(rotated_values(packed, site.dtype)), packed.rotation)
        linears |= dict.fromkeys(site.nodes, pair)
    return linears, {name: program.tensors[name].detach() for name in program.replaced}


def _with_stored(program: Program, block: Block, stored: Mapping[str, Tensor]) -> Program:
    """The program with what `train_block` made of a block."""
    before, after = stored["errors"].tolist()
    facts: dict[str, list[object]] = {}
    for site in block.sites:
        old = program.fact(site.name, Packed)
        roles = {
            n.rpartition("/")[2]: t for n, t in stored.items() if n.startswith(site.name + "/")
        }
        packed = from_tensors(roles, site.n, site.k, old.weight.group, old.weight.rotation)
        gram = program.fact(site.name, Statistics).load(site.k)
        left = output_error(program.weight(site) - packed.dequantize(), gram)
        fresh = replace(old, weight=packed, error=left / old.energy)
        facts[site.name] = [fresh, BlockTuning(block.name, before, after)]
    changed = {n.removeprefix("tensor/"): t for n, t in stored.items() if n.startswith("tensor/")}
    return with_tensors(program, changed).with_facts(facts)
