"""Quantizers of other packages, each in one file, measured beside lowra.

Importing this package imports none of theirs: a peer that is not installed is named, not missed.
"""

from __future__ import annotations

from benchmarks.quality.peers import autoround, gptq, hqq, llamacpp, llamacpp_file, loftq, nf4
from benchmarks.quality.peers.interface import Peer, Quantized

PEERS: dict[str, Peer] = {
    module.PEER.name: module.PEER
    for module in (nf4, loftq, hqq, gptq, autoround, llamacpp, llamacpp_file)
}

__all__ = ["PEERS", "Peer", "Quantized"]
