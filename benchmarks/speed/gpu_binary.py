"""A probe: how fast a GPU's tensor cores multiply single bits, `mma.m16n8k256 and popc`.

    python -m benchmarks.speed.gpu_binary [--count]

Codes of 1 bit need no look-up there, and 8 bit planes of an activation are the 8 columns of a
product: 16 rows by 256 columns of one token in one instruction. Whether kernels for that are worth
writing depends on a rate that no data sheet of these devices names. `--count` compiles the probe
for sm_80 and sm_90 and needs no device: whether the instruction is one there, or emulated.

Writes benchmarks/results/speed_gpu_binary.json where it measures. Needs Triton.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from rich.console import Console

from benchmarks.results_file import write_results
from lowra.backends.triton.build import load
from lowra.backends.triton.static import Machine, compile_kernel, machine_code
from lowra.backends.triton.targets import TARGETS, Target
from lowra.workflows.gpu_timing import seconds_of

CHAINS = 8
"""Products in flight in a warp, none of which waits for another."""
WARPS, TURNS = 4, 4096
PROGRAMS_PER_PROCESSOR = 4
ROWS, TOKENS, COLUMNS = 16, 8, 256
"""Of one instruction."""
START = "x#, y#, z#, w# = lane + #, lane, lane, lane"
"""Of a chain; equal chains would be compiled to one."""
CHAIN = "x#, y#, z#, w# = product(a, b, x#, y#, z#, w#)"
SOURCE = f"""\
import triton
import triton.language as tl


@triton.jit
def product(a, b, x, y, z, w):
    return tl.inline_asm_elementwise(
        "mma.sync.aligned.m16n8k256.row.col.s32.b1.b1.s32.and.popc "
        "{{$0, $1, $2, $3}}, {{$4, $4, $4, $4}}, {{$5, $5}}, {{$6, $7, $8, $9}};",
        "=r,=r,=r,=r,r,r,r,r,r,r", [a, b, x, y, z, w],
        dtype=(tl.int32, tl.int32, tl.int32, tl.int32), is_pure=True, pack=1,
    )


@triton.jit
def kernel(codes, planes, sums, turns):
    lane = tl.arange(0, {32 * WARPS})
    a, b = tl.load(codes + lane), tl.load(planes + lane)
    {"; ".join(START.replace("#", str(i)) for i in range(CHAINS))}
    for _ in range(turns):
        {"; ".join(CHAIN.replace("#", str(i)) for i in range(CHAINS))}
    total = {" + ".join(f"{n}{i}" for i in range(CHAINS) for n in "xyzw")}
    tl.store(sums + tl.program_id(0) * {32 * WARPS} + lane, total)
"""


def counted(target: Target) -> Machine:
    """The machine code of the probe."""
    signature = {"codes": "*i32", "planes": "*i32", "sums": "*i32", "turns": "i32"}
    kernel = load(f"binary-{target.name}", SOURCE)
    return machine_code(compile_kernel(kernel, signature, target, {"num_warps": WARPS}))


def measured() -> dict[str, Any]:
    """Products of bits per second of all processors, each busy with WARPS * 4 warps."""
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    programs = PROGRAMS_PER_PROCESSOR * properties.multi_processor_count
    codes, planes = (
        torch.randint(-(1 << 31), 1 << 31, (32 * WARPS,), dtype=torch.int32, device="cuda")
        for _ in range(2)
    )
    sums = torch.empty(programs * 32 * WARPS, dtype=torch.int32, device="cuda")
    kernel = load("binary", SOURCE)

    def run(_: int) -> None:
        kernel[(programs,)](codes, planes, sums, TURNS, num_warps=WARPS)

    seconds = seconds_of({"bits": (run, 1)})["bits"]
    products = programs * WARPS * TURNS * CHAINS
    return {
        "gpu": torch.cuda.get_device_name(), "seconds": seconds,
        "tera_operations_per_s": 2e-12 * products * ROWS * TOKENS * COLUMNS / seconds,
        "weights_of_a_token_per_s": products * ROWS * COLUMNS / seconds,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", action="store_true")
    console = Console()
    if parser.parse_args().count:
        for target in TARGETS:
            if target.name in ("sm80", "sm90"):
                code = counted(target)
                found = {op: n for op, n in code.counts.items() if "MMA" in op}
                console.print(target.name, found, f"{code.stack_bytes} bytes of stack")
        return
    if not torch.cuda.is_available():
        raise SystemExit("nothing measured: no CUDA device; --count needs none")
    found = measured()
    console.print(found)
    console.print(f"wrote {write_results('speed_gpu_binary', found)}")


if __name__ == "__main__":
    main()
