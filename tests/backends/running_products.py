"""What runs on behind the instructions that follow it: `wgmma` of sm_90, in machine code."""

from __future__ import annotations

import re

LINE = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?);", re.M)
PRODUCT = re.compile(r"HGMMA\S*\s+R\d+,\s*R(\d+),")
WAITS = re.compile(r"WARPGROUP\.DEPBAR\.LE gsb0, 0x(\d+)")
WRITES = re.compile(r"(\S+)\s+(?:U?P\w+,\s*)?R(\d+)\b")
WRITES_NONE = ("ST", "BAR", "LDGSTS", "RED", "CCTL", "ISETP", "FSETP", "ATOM")


def overwritten(text: str) -> list[str]:
    """Instructions that write a register which a product may still read: in the order of the text,
    and twice around every loop that has products."""
    lines = LINE.findall(text)
    at = {int(address, 16): i for i, (address, _) in enumerate(lines)}
    found = _walked([line for _, line in lines])
    for i, (address, line) in enumerate(lines):
        jump = re.search(r"\bBRA(?:\.\w+)*\s+.*?0x([0-9a-f]+)", line)
        if jump and int(jump[1], 16) < int(address, 16):
            body = [line for _, line in lines[at[int(jump[1], 16)] : i + 1]]
            found += _walked(body + body) if any("HGMMA" in line for line in body) else []
    return found


def _walked(lines: list[str]) -> list[str]:
    groups, found = [set[int]()], list[str]()  # the last one is not closed yet
    for line in lines:
        text = re.sub(r"^@!?U?P\w+\s+", "", line)
        if wait := WAITS.match(text):
            groups = [*groups[:-1][len(groups) - 1 - int(wait[1]) :], groups[-1]]
        elif product := PRODUCT.match(text):
            groups[-1].update(range(int(product[1]), int(product[1]) + 4))
            groups += [set()] if "gsb0" in text else []
        elif (written := WRITES.match(text)) and not text.startswith(WRITES_NONE):
            first = int(written[2])
            if set().union(*groups) & set(range(first, first + _registers(written[1]))):
                found.append(line)
    return found


def _registers(opcode: str) -> int:
    if opcode.endswith(".128") or ".M88.4" in opcode:
        return 4
    return 2 if ".64" in opcode or "WIDE" in opcode or opcode.startswith("CS2R") else 1
