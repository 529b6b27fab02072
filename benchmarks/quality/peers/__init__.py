"""Quantizers of other packages, each in one file, measured beside lowra.

Importing this package imports none of theirs: a peer that is not installed is named, not missed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from benchmarks.quality.peers import autoround, gptq, hqq, llamacpp, llamacpp_file, loftq, nf4
from benchmarks.quality.peers.interface import Peer, Quantized

PEERS: dict[str, Peer] = {
    module.PEER.name: module.PEER
    for module in (nf4, loftq, hqq, gptq, autoround, llamacpp, llamacpp_file)
}


def unmeasured(rows: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """Why a peer has no row yet, or a peer that has rows lacks one of its settings."""
    known = {row[key] for row in rows for key in ("name", "method")}
    reasons: dict[str, str] = {}
    for peer in PEERS.values():
        why = peer.missing() or "not measured yet"
        names = peer.settings if peer.name in known else (peer.name,)
        reasons.update({name: why for name in names if name not in known})
    return reasons


__all__ = ["PEERS", "Peer", "Quantized", "unmeasured"]
