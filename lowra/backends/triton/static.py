"""Kernels compiled without a device, and what the compiler and the machine code say of them."""

from __future__ import annotations

import importlib
import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowra.backends.triton.build import anew_where_broken, compile_options, kernel_of
from lowra.backends.triton.emit import arguments
from lowra.backends.triton.keys import ExpandKey, GatherKey, Key, ProductKey, RoundKey, ShrinkKey
from lowra.backends.triton.targets import Target

POINTERS = {
    "codes": "*i32", "code_bytes": "*u8", "books": "*fp16", "scales": "*fp16", "order": "*i32",
    "tiles": "*i32", "partial": "*fp32", "counters": "*i32", "signs": "*fp32", "pages": "*i32",
    "page_bytes": "*u8", "halves": "*fp16", "brains": "*bf16", "floats": "*fp32", "tables": "*fp32",
    "chunks": "*i32", "bounds": "*i32", "scalings": "*fp32", "slots": "*i32", "weights": "*fp32",
    "level_words": "*i32", "level_bytes": "*i8", "steps": "*fp32", "sums": "*fp32",
}  # fmt: skip
SHORT = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
ALIGNED_NUMBERS = ("n", "k", "first_column", "last_column", "line")
INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", re.M)
USAGE = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+)")


@dataclass(frozen=True)
class Static:
    """What is known of a compiled kernel. texts: by stage, as Triton names them (ptx, ttgir)."""

    texts: dict[str, Any]
    shared_bytes: int


def compile_for(key: Key) -> Static:
    """Compile the kernel of `key` for its target; sizes n and k are taken as multiples of 16, as
    Triton takes them where they are."""
    signature = {name: _type(name, key) for name in arguments(key)}
    return compile_kernel(kernel_of(key), signature, key.target, compile_options(key))


def compile_kernel(
    kernel: Any, signature: dict[str, str], target: Target, options: dict[str, Any]
) -> Static:
    """Compile a kernel with arguments of those types: `*i32` is a pointer, aligned to 16 bytes."""
    triton, backends, compiler = _triton(), _triton(".backends.compiler"), _triton(".compiler")
    source = compiler.ASTSource(
        fn=kernel,
        signature=signature,
        attrs={
            (i,): [["tt.divisibility", 16]]
            for i, (name, kind) in enumerate(signature.items())
            if kind.startswith("*") or name in ALIGNED_NUMBERS
        },
    )
    device = backends.GPUTarget(target.backend, target.arch, target.warp)
    made = anew_where_broken(lambda: triton.compile(source, target=device, options=options))
    return Static(dict(made.asm), made.metadata.shared)


def _triton(module: str = "") -> Any:
    # By name: this package is called triton too, and type checkers take it for the other.
    return importlib.import_module(f"triton{module}")


def _type(name: str, key: Key) -> str:
    if name == "scaling":
        return "fp32"
    if name in ("m", "rank", "place", "places", "parts", "first", "levels", *ALIGNED_NUMBERS):
        return "i32"
    if isinstance(key, RoundKey):
        return {"codes": "*u8", "columns": "*i64"}.get(name, "*fp32")
    if name == "hidden" and isinstance(key, GatherKey | ExpandKey):
        return "*fp32"
    if name == "out" and isinstance(key, ExpandKey):
        return f"*{SHORT[key.out_dtype]}"
    if name in ("lora_a", "lora_b") and isinstance(key, ShrinkKey | ProductKey):
        return f"*{SHORT[key.factor_dtype or key.dtype]}"
    return POINTERS.get(name, f"*{SHORT[key.dtype]}")


@dataclass(frozen=True)
class Machine:
    """Machine code of an NVIDIA kernel. counts: instructions by opcode, over the whole text."""

    registers: int
    stack_bytes: int
    text: str
    counts: Counter[str]


def machine_code(static: Static) -> Machine:
    """Disassembled with the tools that Triton brings."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(static.texts["cubin"])
        text = _tool("cuobjdump", "-sass", str(file))
        usage = _tool("cuobjdump", "-res-usage", str(file))
    found = USAGE.search(usage)
    assert found is not None, usage
    return Machine(int(found[1]), int(found[2]), text, Counter(INSTRUCTION.findall(text)))


def _tool(name: str, *options: str) -> str:
    path = Path(_triton().__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run(
        [str(path), *options], capture_output=True, text=True, check=True, timeout=120
    ).stdout


def loop_instructions(code: Machine) -> list[Counter[str]]:
    """Opcodes between each backward branch and its target: the bodies of innermost loops."""
    lines = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?);", code.text, re.M)
    at = {int(address, 16): i for i, (address, _) in enumerate(lines)}
    bodies: list[tuple[int, int]] = []
    for i, (address, text) in enumerate(lines):
        jump = re.search(r"\bBRA(?:\.\w+)*\s+.*?0x([0-9a-f]+)", text)
        if jump and int(jump[1], 16) < int(address, 16) and int(jump[1], 16) in at:
            bodies.append((at[int(jump[1], 16)], i))
    inner = [
        (a, b)
        for a, b in bodies
        if not any(a <= c and d <= b and (a, b) != (c, d) for c, d in bodies)
    ]
    opcode = re.compile(r"(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)")
    return [
        Counter(found[1] for _, text in lines[a : b + 1] if (found := opcode.match(text)))
        for a, b in inner
    ]
