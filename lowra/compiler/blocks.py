"""Blocks of a graph: runs of nodes between places where one activation carries everything.

In a transformer these are its layers: the residual stream enters and leaves, and beside it only
values that do not depend on the data cross a border (rotary tables, masks, sizes).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile

from torch import fx

from lowra.compiler.program import Program, Site


@dataclass(frozen=True)
class Block:
    """Node names in order, the sites among them, and the values that enter and leave."""

    nodes: tuple[str, ...]
    sites: tuple[Site, ...]
    entry: str
    exit: str

    @property
    def name(self) -> str:
        """What the sites' names have in common, such as `model.layers.3`."""
        columns = zip(*(site.name.split(".") for site in self.sites), strict=False)
        shared = [words[0] for words in takewhile(lambda words: len(set(words)) == 1, columns)]
        return ".".join(shared) or self.sites[0].name


def find_blocks(program: Program) -> list[Block]:
    """The blocks of a program that hold its sites, in order; empty where it has no graph.

    A border is a position where exactly one value that depends on the first input is still to be
    read. Runs between borders that hold a site are joined in groups of equal kind (attention and
    MLP into a layer). Empty when some site lies in no such run.
    """
    if program.graph is None or not program.inputs:
        return []
    nodes = list(program.graph.nodes)
    site_of = {name: site for site in program.sites for name in site.nodes}
    runs = _runs(nodes, _crossing(nodes), set(site_of))
    kinds = [tuple((site_of[n.name].n, site_of[n.name].k) for n in nodes[a : b + 1]
                   if n.name in site_of) for a, b, _, _ in runs]  # fmt: skip
    blocks: list[Block] = []
    for first, last in _groups(kinds):
        start, end = runs[first][0], runs[last][1]
        names = tuple(node.name for node in nodes[start : end + 1])
        sites = tuple(dict.fromkeys(site_of[name] for name in names if name in site_of))
        blocks.append(Block(names, sites, runs[first][2], runs[last][3]))
    seen = [site.name for block in blocks for site in block.sites]
    whole = len(seen) == len(set(seen)) == len(program.sites)
    covered = {name for block in blocks for name in block.nodes}
    return blocks if whole and covered >= set(site_of) else []


def _crossing(nodes: Sequence[fx.Node]) -> list[str | None]:
    """Per position, the only data-dependent value that is still to be read; None where several."""
    placeholders = [node for node in nodes if node.op == "placeholder"]
    data: set[fx.Node] = set(placeholders[:1])
    for node in nodes:
        if not _is_size(node) and any(source in data for source in node.all_input_nodes):
            data.add(node)
    position = {node: index for index, node in enumerate(nodes)}
    last = {
        node: max((position[user] for user in node.users if not _is_size(user)), default=-1)
        for node in data
    }
    live: set[fx.Node] = set()
    found: list[str | None] = []
    for index, node in enumerate(nodes):
        if node in data:
            live.add(node)
        live = {value for value in live if last[value] > index}
        found.append(next(iter(live)).name if len(live) == 1 else None)
    return found


def _is_size(node: fx.Node) -> bool:
    """True for a node that reads only a tensor's shape."""
    return "sym_size" in str(node.target)


def _runs(
    nodes: Sequence[fx.Node], crossing: Sequence[str | None], marked: set[str]
) -> list[tuple[int, int, str, str]]:
    """(first, last position, value that enters, value that leaves) of the shortest runs between
    borders that hold a marked node."""
    runs: list[tuple[int, int, str, str]] = []
    border, held = -1, False
    for index, node in enumerate(nodes):
        held = held or node.name in marked
        leaves = crossing[index]
        if leaves is None:
            continue
        enters = crossing[border] if border >= 0 else None
        if held and enters not in (None, leaves):
            runs.append((border + 1, index, str(enters), leaves))
        if held or not runs:  # what stands between two runs belongs to the second
            border, held = index, False
    return runs


def _groups(kinds: Sequence[object]) -> list[tuple[int, int]]:
    """(first, last index) of consecutive runs to join: the shortest period that repeats from the
    start; runs that are left over stand alone, and so do all where nothing repeats."""
    count = len(kinds)
    for period in range(1, count // 2 + 1):
        whole = count // period * period
        if all(kinds[i] == kinds[i + period] for i in range(whole - period)):
            joined = [(i, i + period - 1) for i in range(0, whole, period)]
            return joined + [(i, i) for i in range(whole, count)]
    return [(i, i) for i in range(count)]
