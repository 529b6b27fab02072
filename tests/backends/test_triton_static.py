"""GPU kernels compiled without a GPU: what the machine code says of spills, loads and look-ups."""

from __future__ import annotations

import functools
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lowra.backends.triton.adapters import tokens_of
from lowra.backends.triton.emit import emit
from lowra.backends.triton.keys import (
    Blocks,
    ExpandKey,
    GatherKey,
    IntegerKey,
    Key,
    LinearKey,
    QuantizeKey,
    RotateKey,
    ShrinkKey,
    ValuesKey,
    weight_key,
)
from lowra.backends.triton.rounding import rounding_key
from lowra.backends.triton.schedule import (
    MOST_FUSED_RANK,
    blocks_of,
    integer_choice,
    linear_blocks,
    values_blocks,
)
from lowra.backends.triton.shared_memory import shared_bytes
from lowra.backends.triton.static import (
    Machine,
    Static,
    compile_for,
    loop_instructions,
    machine_code,
)
from lowra.backends.triton.targets import TARGETS, Target
from lowra.backends.triton.tuning import MOST_RANK, SHIPPED, read_table
from lowra.compiler.packing import FORMATS, width_id
from tests.backends.running_products import overwritten

triton = pytest.importorskip("triton", reason="Triton is not installed: lowra[triton]")
BY_NAME = {target.name: target for target in TARGETS}
SM90 = BY_NAME["sm90"]
SHARED_BYTES = {name: target.shared_bytes for name, target in BY_NAME.items()}
ALU = ("LOP3", "SHF", "PRMT", "SEL", "ISETP", "IADD3", "LEA")
"""Instructions of which a processor issues 64 lanes per clock, half of its others."""
BUDGET = {
    1: (2.3, 1.2), 2: (2.8, 1.45), 3: (3.0, 1.85), 4: (4.3, 3.0), 9: (4.0, 1.8),
    11: (3.5, 1.9), 12: (4.0, 2.3), 13: (5.9, 4.1),
}  # fmt: skip
"""By width: instructions per weight of a few tokens on sm90, and those of them for the ALU."""
INTEGERS = {
    1: (1.0, 0.6), 2: (1.2, 0.7), 3: (1.6, 0.95), 4: (2.45, 1.6), 9: (2.5, 1.15),
    11: (1.6, 1.0), 12: (2.25, 1.25), 13: (3.3, 2.1),
}  # fmt: skip
"""The same of products in 8-bit integers, of one token."""


@pytest.fixture(autouse=True, scope="module")
def _caches(tmp_path_factory: pytest.TempPathFactory) -> None:
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("kernels")
        patch.setenv("LOWRA_HOME", str(folder))
        patch.setenv("TRITON_CACHE_DIR", str(folder / "triton"))
        yield


@functools.cache
def compiled(key: Key) -> Static:
    return compile_for(key)


@functools.cache
def machine(key: Key) -> Machine:
    return machine_code(compiled(key))


def decode(
    target: Target, panels: list[int], k: int = 10240, rank: int = 0, m: int = 1
) -> LinearKey:
    """A product of few tokens, as `launch.product` would choose it for many rows."""
    weight = weight_key(panels, k, -1, False, len(panels) > 2)
    blocks = blocks_of(weight, (*panels,), m, torch.bfloat16, target)
    waits = target.overlaps
    return LinearKey(target, weight, "bfloat16", blocks, rank, False, True, waits)


def loop_of(key: LinearKey, width: int) -> tuple[Counter[str], float]:
    """Instructions of the loop over tiles, and the weights that a thread takes in one turn."""
    longest = max(loop_instructions(machine(key)), key=lambda loop: sum(loop.values()))
    columns = 320 if width == 9 else 256
    return longest, key.blocks.rows * columns / (32 * key.blocks.warps)


def no_spills(code: Machine) -> bool:
    opcodes = {opcode.split(".")[0] for opcode in code.counts}
    return code.stack_bytes == 0 and not opcodes & {"LDL", "STL"}


@pytest.mark.parametrize("width", BUDGET)
def test_instructions_per_weight_stay_in_their_budget(width: int) -> None:
    key = decode(SM90, [width, 8192])
    loop, weights = loop_of(key, width)
    whole, alu = BUDGET[width]
    assert sum(loop.values()) / weights <= whole
    assert sum(n for op, n in loop.items() if op.split(".")[0] in ALU) / weights <= alu
    assert no_spills(machine(key)) and machine(key).registers <= 255
    assert any(op.startswith("HGMMA") for op in loop)
    assert not overwritten(machine(key).text)


LOOP = """
        /*0100*/  LDS.64 R32, [R19+0x6000] ;
        /*0110*/  PRMT R40, R32, 0x5140, R33 ;
        /*0120*/  HGMMA.64x16x16.F32.BF16 R24, R36, gdesc[UR12], R24, gsb0 ;
        /*0130*/  WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*0140*/  HGMMA.64x16x16.F32.BF16 R24, R40, gdesc[UR12], R24, gsb0 ;
        /*0150*/  @P0 BRA 0x100 ;
"""


def test_a_product_that_runs_on_into_the_next_turn_is_found_out() -> None:
    """As Triton 3.6 writes it where nothing asks for sums within the loop."""
    assert overwritten(LOOP) == ["PRMT R40, R32, 0x5140, R33 "]
    wait = "/*0148*/ WARPGROUP.DEPBAR.LE gsb0, 0x{} ;\n        /*0150*/"
    assert not overwritten(LOOP.replace("/*0150*/", wait.format(0)))
    assert overwritten(LOOP.replace("/*0150*/", wait.format(1)))
    assert overwritten(LOOP.replace("PRMT R40", "LOP3.LUT P1, R41"))


def in_integers(target: Target, panels: list[int], m: int, fine: bool, rank: int) -> IntegerKey:
    """A product in integers, as `integer.product` would choose it for many rows."""
    blocks = integer_choice((*panels,), 10240, m, fine, 132).blocks
    assert blocks is not None
    weight = weight_key(panels, 10240, -1, False, len(panels) > 2)
    return IntegerKey(
        target, weight, "bfloat16", blocks, rank, False, fine, target.overlaps, "float32", fine
    )  # fmt: skip


@pytest.mark.parametrize("width", INTEGERS)
def test_instructions_per_weight_in_integers(width: int) -> None:
    """And nothing passes through shared memory on the way; words and tokens are loaded by 16
    bytes (what is not, are steps, and the upper plane of 3 bits)."""
    key = in_integers(SM90, [width, 8192], 1, False, 0)
    code = machine(key)
    loop = max(loop_instructions(code), key=lambda counts: sum(counts.values()))
    in_a_word = 20 if width == 9 else 32 // FORMATS[width].planes[0]
    weights = key.blocks.stages * key.blocks.rows * 64 * in_a_word / (32 * key.blocks.warps)
    whole, alu = INTEGERS[width]
    assert sum(loop.values()) / weights <= whole
    assert sum(n for op, n in loop.items() if op.split(".")[0] in ALU) / weights <= alu
    products = sum(n for op, n in loop.items() if op.startswith("IDP.4A"))
    assert products * 4 == weights * (2 if width == 9 else 1)
    assert no_spills(code) and not [op for op in loop if op.startswith(("STS", "LDS", "SHFL"))]
    wide = sum(n for op, n in loop.items() if op.startswith("LDG") and op.endswith(".128"))
    others = sum(n for op, n in loop.items() if op.startswith("LDG") and not op.endswith(".128"))
    assert wide >= others


@pytest.mark.parametrize(
    ("target", "m", "fine"), [("sm80", 2, False), ("sm90", 2, True), ("sm100", 2, False)]
)
def test_integers_of_mixed_widths_compile_everywhere(target: str, m: int, fine: bool) -> None:
    key = in_integers(BY_NAME[target], [4, 2048, 2, 4096, 9, 2048], m, fine, 16)
    ahead = QuantizeKey(BY_NAME[target], "bfloat16", (2, 4, 9), fine, BY_NAME[target].overlaps)
    for one in (key, ahead):
        assert no_spills(machine(one)) and compiled(one).shared_bytes <= 4096
    overlaps = BY_NAME[target].overlaps
    assert ("griddepcontrol.wait" in compiled(key).texts["ptx"]) == overlaps
    assert ("griddepcontrol.launch_dependents" in compiled(ahead).texts["ptx"]) == overlaps
    assert "dp4a.s32.s32" in compiled(key).texts["ptx"]


def test_factors_in_float32_beside_halves_have_room() -> None:
    """As trained ones are; of the largest rank that is fused."""
    plain = decode(SM90, [2, 8192], rank=MOST_FUSED_RANK, m=16)
    key = replace(plain, factor_dtype="float32")
    room = shared_bytes(key.weight, 2, key.blocks, MOST_FUSED_RANK, SM90)
    assert compiled(key).shared_bytes <= room <= SM90.shared_bytes and key.name != plain.name
    assert no_spills(machine(key))


@pytest.mark.parametrize("width", [2, 9])
def test_integers_with_a_codebook_per_row_compile_without_spills(width: int) -> None:
    key = in_integers(SM90, [width, 8192], 1, False, 128)
    key = replace(key, weight=weight_key([width, 8192], 10240, -1, True, True), bias=True)
    assert no_spills(machine(key))


def shipped() -> list[LinearKey]:
    """The kernels of all shipped choices, with factors of the largest rank that they serve."""
    found = dict[LinearKey, None]()
    for case, choice in read_table(SHIPPED / "nvidia-h200.json").items():
        name, shape, dtype, _ = case.split(" ")
        if choice.blocks is None:
            continue
        n, k = map(int, shape.split("x"))
        widths = re.findall(r"t?\d", name.split("-")[0])
        ids = [width_id(int(width[-1]), len(width) == 2) for width in widths]
        panels = [number for id in ids for number in (id, n // len(ids))]
        weight = weight_key(panels, k, -1, False, len(ids) > 1)
        assert weight.text == name
        waits, split = choice.blocks.tokens == 16, choice.parts > 1
        key = LinearKey(SM90, weight, dtype, choice.blocks, MOST_RANK, False, split, waits)
        found[key] = None
    return list(found)


@pytest.mark.parametrize("key", shipped(), ids=lambda key: key.name)
def test_shipped_choices_have_room_on_their_device(key: LinearKey) -> None:
    assert compiled(key).shared_bytes <= SHARED_BYTES["sm90"]
    assert no_spills(machine(key))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_unpacked_values_are_looked_up_as_they_are_stored(dtype: str) -> None:
    """In float16, like codebooks, whatever is written; rounded once, when it is. No value is read
    from a table in memory where there are byte permutes."""
    weight = weight_key([8, 32, 4, 32, 3, 32, 2, 32, 1, 32], 1024, -1, True, True)
    text = emit(ValuesKey(SM90, weight, dtype, values_blocks()))
    assert text.count("dtype=(tl.float16,)") == 4 and "bfloat16" not in text.split("\n", 1)[1]
    eight, others = text.split("elif width == 4")
    assert "tl.load(books" in eight and "tl.load(books" not in others


@pytest.mark.parametrize("target", ["sm80", "sm90"])
@pytest.mark.parametrize("width", [1, 2, 3, 4, 11, 12, 13])
def test_values_go_from_look_up_to_tensor_core_in_registers(width: int, target: str) -> None:
    """No value of W is written to shared memory or passed between lanes on the way."""
    key = decode(BY_NAME[target], [width, 8192])
    loop, _ = loop_of(key, width)
    assert not [op for op in loop if op.startswith(("STS", "SHFL", "STSM"))], loop
    product = "wgmma.mma_async" if target == "sm90" else "mma.sync.aligned.m16n8k16"
    assert product in compiled(key).texts["ptx"]


@pytest.mark.parametrize("width", [1, 2, 3, 4, 11, 12, 13])
def test_loads_are_asynchronous_and_wide(width: int) -> None:
    """Words in 8 bytes per lane, so that they land where they are multiplied; tokens in 16."""
    loop, _ = loop_of(decode(SM90, [width, 8192]), width)
    copies = {op for op in loop if op.startswith("LDGSTS")}
    assert any(op.endswith(".64") for op in copies) and any(op.endswith(".128") for op in copies)
    assert all(op.endswith((".64", ".128")) for op in copies), copies
    assert not [op for op in loop if op.startswith("LDG.")]


def test_misaligned_rows_are_read_in_smaller_pieces() -> None:
    """576 columns of 1 bit are 18 words: rows begin at multiples of 8 bytes, 15 words at none."""
    for k, widest in ((576, ".64"), (480, "LDGSTS.E")):
        key = decode(SM90, [1, 8192], k)
        loop, _ = loop_of(key, 1)
        words = [op for op in loop if op.startswith("LDGSTS") and not op.endswith(".128")]
        assert words and all(op.startswith(widest) or op.endswith(widest) for op in words), words


@pytest.mark.parametrize("target", BY_NAME)
def test_mixed_widths_with_an_adapter_compile_everywhere(target: str) -> None:
    key = decode(BY_NAME[target], [4, 2048, 2, 4096, 9, 2048], k=4096, rank=16)
    static = compiled(key)
    assert static.shared_bytes <= SHARED_BYTES[target]
    if target == "gfx942":
        assert "v_mfma" in static.texts["amdgcn"]
        return
    assert no_spills(machine(key))
    assert ("griddepcontrol.wait" in static.texts["ptx"]) == BY_NAME[target].overlaps
    products = r"wgmma\.mma_async|mma\.sync|tcgen05\.mma"
    loops = [loop for loop in loop_instructions(machine(key)) if "MMA" in " ".join(loop)]
    assert len(loops) >= 3 and re.search(products, static.texts["ptx"])  # one per width


@pytest.mark.parametrize("target", BY_NAME)
def test_many_tokens_use_the_tensor_cores_of_each_target(target: str) -> None:
    blocks = linear_blocks(512, BY_NAME[target])
    key = LinearKey(
        BY_NAME[target], weight_key([2, 8192], 8192, -1, False, False), "bfloat16", blocks
    )
    static = compiled(key)
    assert static.shared_bytes <= SHARED_BYTES[target]
    expected = {
        "sm80": ("ptx", "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"),
        "sm90": ("ptx", "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16"),
        "sm100": ("ptx", "tcgen05.mma"), "gfx942": ("amdgcn", "v_mfma"),
    }  # fmt: skip
    stage, instruction = expected[target]
    assert instruction in static.texts[stage]
    if target != "gfx942":
        assert no_spills(machine(key))
    if target == "sm90":  # the look-up of 256 columns, shared by 128 tokens
        assert not overwritten(machine(key).text)
        loop, weights = loop_of(key, 2)
        assert sum(loop.values()) / weights < 3.5


@pytest.mark.parametrize(
    "target",
    ["sm90", *(pytest.param(t, marks=pytest.mark.slow) for t in ("sm80", "sm100", "gfx942"))],
)
def test_mixed_trellis_codes_compile_everywhere(target: str) -> None:
    """Products of few tokens, with an adapter, and of many; values."""
    on, panels = BY_NAME[target], [13, 2048, 12, 4096, 11, 2048]
    few, many = decode(on, panels, 4096, 16), decode(on, panels, 4096, m=128)
    values = ValuesKey(on, few.weight, "bfloat16", values_blocks())
    expected = {
        "sm80": ("ptx", "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"),
        "sm90": ("ptx", "wgmma.mma_async.sync.aligned.m64n"), "sm100": ("ptx", "tcgen05.mma"),
        "gfx942": ("amdgcn", "v_mfma"),
    }  # fmt: skip
    for key in (few, many):
        stage, instruction = expected[target]
        assert instruction in compiled(key).texts[stage]
    for key in (few, many, values):
        assert compiled(key).shared_bytes <= SHARED_BYTES[target]
        # On sm80, three bits for many tokens want more registers than there are.
        assert target == "gfx942" or (target, key) == ("sm80", many) or no_spills(machine(key))


@pytest.mark.parametrize(
    ("target", "m", "dtype"),
    [
        ("sm90", 1, "bfloat16"), ("gfx942", 1, "bfloat16"), ("sm80", 512, "float32"),
        ("sm100", 512, "float16"),
        *(pytest.param(t, 1, "bfloat16", marks=pytest.mark.slow) for t in ("sm80", "sm100")),
        pytest.param("sm80", 512, "float16", marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_kernels_of_adapters_compile_everywhere(target: str, m: int, dtype: str) -> None:
    """Half precision is multiplied in TF32; the registers hold all that a program works on."""
    blocks = Blocks(16, tokens_of(m, getattr(torch, dtype)), 8, 2)
    for key in (
        GatherKey(BY_NAME[target], dtype, blocks),
        ExpandKey(BY_NAME[target], dtype, dtype, blocks),
    ):
        static = compiled(key)
        assert static.shared_bytes <= SHARED_BYTES[target]
        if target == "gfx942":
            assert dtype == "float32" or "v_mfma" in static.texts["amdgcn"]
            continue
        opcodes = {opcode.split(".")[0] for opcode in machine(key).counts}
        assert not opcodes & {"LDL", "STL"}, key.name
        assert dtype == "float32" or ".f32.tf32.tf32" in static.texts["ptx"]


OTHERS = {
    "groups and a row's own tables": weight_key([4, 64, 2, 64], 4096, 64, True, True),
    "groups across blocks": weight_key([3, 64, 1, 64], 4000, 40, False, True),
    "8 bits": weight_key([8, 128], 4096, -1, False, False),
    "tails": weight_key([2, 64, 9, 64], 4000, -1, False, True),
}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("kind", OTHERS)
@pytest.mark.parametrize("target", BY_NAME)
def test_other_weights_and_dtypes_compile_everywhere(target: str, kind: str, dtype: str) -> None:
    on, weight = BY_NAME[target], OTHERS[kind]
    panels = tuple(number for panel in weight.panels for number in (panel.width, 64))
    blocks = blocks_of(weight, panels, 1, getattr(torch, dtype), on)
    for key in (
        LinearKey(on, weight, dtype, blocks, 16, True, True),
        ValuesKey(on, weight, dtype, values_blocks()),
    ):
        assert compiled(key).shared_bytes <= on.shared_bytes


@pytest.mark.parametrize("target", BY_NAME)
def test_the_other_kernels_compile_everywhere(target: str) -> None:
    on = BY_NAME[target]
    weight = weight_key([4, 2048, 2, 2048], 4096, -1, False, True)
    keys: list[Key] = [
        ValuesKey(on, weight, "bfloat16", values_blocks()),
        ShrinkKey(on, "bfloat16", "float32", Blocks(16, 16, 4, 3), on.overlaps),
        RotateKey(on, "bfloat16", 4096, False, on.overlaps),
        RotateKey(on, "bfloat16", 64, back=True),
    ]  # fmt: skip
    for key in keys:
        static = compiled(key)
        assert static.shared_bytes <= SHARED_BYTES[target]
        assert target == "gfx942" or no_spills(machine(key))
    if target != "gfx942":
        assert machine(keys[0]).counts["STG.E.128"]  # 16 bytes of values per store
        for key in keys[1:3]:
            for what in ("launch_dependents", "wait"):
                assert (f"griddepcontrol.{what}" in compiled(key).texts["ptx"]) == on.overlaps


@pytest.mark.parametrize(
    "target",
    ["sm90", "gfx942", *(pytest.param(t, marks=pytest.mark.slow) for t in ("sm80", "sm100"))],
)
@pytest.mark.parametrize("levels", [4, 256])
def test_kernels_that_round_compile_everywhere(target: str, levels: int) -> None:
    for descends in (False, True):
        key = rounding_key(BY_NAME[target], descends, True, levels)
        static = compiled(key)
        if target == "gfx942":
            assert "vgpr_spill_count: 0" in static.texts["amdgcn"]
            continue
        assert no_spills(machine(key))
        longest = max(loop.total() for loop in loop_instructions(machine(key)))
        assert longest < 1000, "instructions per column"


@pytest.mark.parametrize("damage", [b"", b"{", b'{"target": 7}'])
def test_a_broken_file_in_triton_s_cache_is_compiled_anew(
    damage: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    key = RotateKey(SM90, "bfloat16", 2, back=False)
    before = compile_for(key).texts["ptx"]
    for file in tmp_path.glob("*/kernel.json"):
        file.write_bytes(damage)
    assert compile_for(key).texts["ptx"] == before
