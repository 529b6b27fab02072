"""Kernels that start while the one ahead of them runs (programmatic dependent launch).

What that one writes is read after `WAIT` alone, which every kernel launched so executes: then all
kernels ahead of it have ended, too. Behind `SIGNAL` of all its programs the next kernel may start.
A product signals when its sums are made, not earlier: programs of the next kernel would crowd on
processors that are done first. To ask for codes before `WAIT` was measured (lines or whole tiles
into the second cache, H200, 2026-11-28) and gained nothing.
"""

WAIT, SIGNAL = "tl.extra.cuda.gdc_wait()", "tl.extra.cuda.gdc_launch_dependents()"
