"""Kernels that start while the one ahead of them runs (programmatic dependent launch).

What that one writes is read after `WAIT` alone, which every program launched so executes, before it
writes: then all kernels ahead of it have ended, too. Behind `SIGNAL` of all its programs the next
kernel may start. A product signals when its sums are made, not earlier: programs of the next kernel
would crowd on processors that are done first. To ask for a tile's codes before `WAIT`, into the
second cache, gained nothing (an H200, 2026-11-28).
"""

WAIT, SIGNAL = "tl.extra.cuda.gdc_wait()", "tl.extra.cuda.gdc_launch_dependents()"
