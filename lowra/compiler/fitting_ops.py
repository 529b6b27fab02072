"""The part of the `lowra::` dialect that compiling itself runs on: moments, codebooks, codes.

These ops have no gradient and are never traced; they are ops so that a backend can bring a fast
kernel for them. Rows are independent of each other, so results do not depend on threads (those of
`moments` in plain torch do, in the last bits).

    moments         x [tokens, n], y [tokens, k] or None for x itself, of one floating dtype ->
                    the sum of x y' over the tokens, float32 [n, k]
    lloyd_rows      values [n, k], weights [n or 1, k or 1], starts of several widths [n, L] each
                    -> levels float64 [n, L] of each, then the losses float64 [n, widths]. At most
                    `iterations`, until a row's loss falls by less than `tolerance` of itself. An
                    empty bin keeps its level.
    lloyd_shared    the same with starts [L]: one codebook for all rows and a scale per row, refit
                    in turn, each in closed form -> levels float64 [L], and the losses
    lloyd_scales    fixed levels [L] of several widths -> scales and losses, float64 [n, widths]
    optimal_levels  values, weights as above -> for each of `counts` levels float64 [n, L]: the best
                    codebook among those whose borders are some of 128 candidates, evenly spread
                    over the values' ranks and sizes; every border where a row has fewer values
    feedback_codes  weight [n, k] in the order in which columns are rounded, upper [k, k] (Factor),
                    tables [n, L] ascending and filled up with +inf, scales [n, groups] without
                    zeros (but in runs) or None, columns int64 [k] the scale of each column ->
                    codes uint8 [n, k]
    descend_codes   weight [n, k], gram [k, k], codes and the rest as above: coordinate descent on
                    the output error, at most `sweeps` times over the columns -> codes uint8 [n, k]
                    and float32 [n, k] their slope: what error they leave, times gram. The slope of
                    the codes given may be given too; computing it takes half as long as a sweep

Values, weights, tables and scales are float32, starts and levels float64.

With `runs` int64 [n], both ops on codes round trellis codes (lowra.compiler.trellis): rows of the
same number from 0 on are a run of at most 64, in their order and of one width, -1 stands for a row
of its own. Runs are independent of each other as other rows are. feedback_codes without `upper`
rounds every column by itself.
"""

from __future__ import annotations

from lowra.compiler.ops import LIBRARY

LIBRARY.define("moments(Tensor x, Tensor? y) -> Tensor")
_LLOYD = "Tensor values, Tensor weights, Tensor[] starts, int iterations, float tolerance"
LIBRARY.define(f"lloyd_rows({_LLOYD}) -> Tensor[]")
LIBRARY.define(f"lloyd_shared({_LLOYD}) -> Tensor[]")
LIBRARY.define(f"lloyd_scales({_LLOYD}) -> (Tensor, Tensor)")
LIBRARY.define("optimal_levels(Tensor values, Tensor weights, int[] counts) -> Tensor[]")
_TABLES = "Tensor tables, Tensor? scales, Tensor columns"
LIBRARY.define(
    f"feedback_codes(Tensor weight, Tensor? upper, {_TABLES}, Tensor? runs=None) -> Tensor"
)
LIBRARY.define(
    f"descend_codes(Tensor weight, Tensor gram, {_TABLES}, Tensor codes, Tensor? slope, int sweeps,"
    " Tensor? runs=None) -> (Tensor, Tensor)"
)
