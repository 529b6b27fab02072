"""Optimisers that see the two factors of an adapter as what they are: one low-rank matrix.

AdamW takes A and B for unrelated tensors, so how a product B A is split between them decides how it
moves. These move the product the same way however it is split.
"""

from lowra.optim.lora_rite import LoRARite
from lowra.optim.oplora import OPLoRA
from lowra.optim.pairs import Pair, PairOptimizer, pairs_of

__all__ = ["LoRARite", "OPLoRA", "Pair", "PairOptimizer", "pairs_of"]
