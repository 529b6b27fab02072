"""Tables of tuned choices: what they say is done, what they do not name is left to the rules."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import lowra  # noqa: F401 - registers backends
from lowra.backends.triton import linear, tuning
from lowra.backends.triton.keys import Blocks
from lowra.backends.triton.schedule import UNPACKED, Choice, choose, processors
from lowra.backends.triton.targets import INTERPRETER
from lowra.backends.triton.tuning import (
    add_to_table,
    case_of,
    choice_for,
    entry_of,
    own_table,
    read_table,
    table_of,
)
from lowra.backends.triton.weight import weight_of
from tests.backends.test_cpu_product import Shape, packed_of

CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("own_home")
SHIPPED = sorted(tuning.SHIPPED.glob("*.json"))


def test_a_tuned_case_is_served_as_its_table_says() -> None:
    weight = weight_of(packed_of(Shape(96, 640, (2, 4))).op_args())
    usual = choose(weight.key, weight.panels, 640, 5, torch.float32, processors(CPU), INTERPRETER)
    assert choice_for(weight, 5, torch.float32, 16, INTERPRETER, CPU) == usual
    tuned = Choice(Blocks(32, 16, 2, 1), 2)
    assert tuned != usual
    add_to_table("cpu", {case_of(weight.key.text, 96, 640, torch.float32, 8): entry_of(tuned)})
    assert choice_for(weight, 5, torch.float32, 16, INTERPRETER, CPU) == tuned
    assert choice_for(weight, 8, torch.float32, 64, INTERPRETER, CPU) == tuned
    for m, dtype, rank in ((4, torch.float32, 0), (9, torch.float32, 0), (5, torch.bfloat16, 0),
                           (5, torch.float32, 65)):  # fmt: skip
        assert choice_for(weight, m, dtype, rank, INTERPRETER, CPU) == choose(
            weight.key, weight.panels, 640, m, dtype, processors(CPU), INTERPRETER
        )


@pytest.mark.parametrize(
    "choice",
    [UNPACKED, Choice(Blocks(64, 16, 4, 2), 3), Choice(Blocks(128, 32, 8, 2)),
     Choice(Blocks(32, 16, 1, 1)), Choice(Blocks(64, 16, 4, 2), 30)],
)  # fmt: skip
def test_products_are_the_same_by_every_choice(choice: Choice) -> None:
    pytest.importorskip("triton", reason="Triton is not installed: lowra[triton]")
    packed = packed_of(Shape(90, 1600, (1, 4, 9), block=64))
    weight, generator = weight_of(packed.op_args()), torch.Generator().manual_seed(0)
    x, a, b = (torch.randn(*size, generator=generator) for size in ((7, 1600), (8, 1600), (90, 8)))
    add_to_table("cpu", {case_of(weight.key.text, 90, 1600, torch.float32, 7): entry_of(choice)})
    y = linear.forward(x, packed.op_args(), None, (a, b, 0.5), INTERPRETER)
    dense = packed.dequantize(torch.float64) + 0.5 * b.double() @ a.double()
    torch.testing.assert_close(y.double(), x.double() @ dense.T, rtol=1e-4, atol=1e-3)


def test_tables_are_extended_and_keep_what_they_had() -> None:
    one, two = entry_of(UNPACKED), entry_of(Choice(Blocks(64, 16, 4, 4), 2))
    path = add_to_table("A GPU (2)", {"a": one, "b": one})
    assert path.name == "a-gpu-2.json" and path == own_table("A GPU (2)")
    add_to_table("A GPU (2)", {"b": {**two, "us": 3.5}})
    assert read_table(path) == {"a": UNPACKED, "b": Choice(Blocks(64, 16, 4, 4), 2)}
    assert json.loads(path.read_text())["choices"]["b"]["us"] == 3.5
    assert sorted(file.suffix for file in path.parent.iterdir()) == [".json", ".lock"]


def test_two_processes_lose_none_of_each_others_entries() -> None:
    code = (
        "import sys; from lowra.backends.triton.tuning import add_to_table as add\n"
        "for i in range(150): add('A GPU', {f'{sys.argv[1]}{i}': {'unpacked': True}})"
    )
    running = [subprocess.Popen([sys.executable, "-c", code, name]) for name in "ab"]
    assert [process.wait(timeout=120) for process in running] == [0, 0]
    assert len(read_table(own_table("A GPU"))) == 300


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "Expecting"), ("[]", "format 1"), ('{"format": 2}', "format 1"),
        ('{"format": 1, "choices": []}', "no choices"),
        ('{"format": 1, "choices": {"a": 3}}', "a: 3 is no choice"),
        ('{"format": 1, "choices": {"a": {"rows": 48}}}', "a: rows is 48"),
        ('{"format": 1, "choices": {"a": {"rows": true}}}', "a: rows is True"),
        ('{"format": 1, "choices": {"a": {"rows": 64, "tokens": 32, "warps": 4, "stages": 2, '
         '"parts": 2}}}', "parts of sums"),
        ('{"format": 1, "choices": {"a": {"rows": 64, "tokens": 16, "warps": 8, "stages": 2, '
         '"parts": 2}}}', "16 per warp"),
        ('{"format": 1, "choices": {"a": {"rows": 64, "tokens": 16, "warps": 4, "stages": 2, '
         '"parts": 0}}}', "parts is 0"),
        ('{"format": 1, "choices": {"a": {"rows": 64, "tokens": 16, "warps": 4, "stages": 2, '
         '"parts": 70000}}}', "parts is 70000"),
    ],
)  # fmt: skip
def test_a_damaged_table_is_left_out_and_named(
    text: str, said: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = own_table("NVIDIA H200")
    path.parent.mkdir(parents=True)
    path.write_text(text)
    assert table_of("NVIDIA H200") == read_table(tuning.SHIPPED / "nvidia-h200.json")
    assert said in caplog.text and str(path) in caplog.text and "--tune" in caplog.text
    table_of("NVIDIA H200")
    assert len(caplog.records) == 1


def test_a_users_table_goes_before_the_one_that_is_shipped() -> None:
    case = "w2-row 8192x8192 bfloat16 m1"
    assert table_of("NVIDIA H200")[case] != UNPACKED
    add_to_table("NVIDIA H200", {case: entry_of(UNPACKED)})
    assert table_of("NVIDIA H200")[case] == UNPACKED
    assert len(table_of("NVIDIA H200")) == len(read_table(tuning.SHIPPED / "nvidia-h200.json"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_tables_say_when_and_on_what_they_were_measured(path: Path) -> None:
    data: dict[str, Any] = json.loads(path.read_text())
    assert path.name == tuning.file_name(data["device"]) and read_table(path)
    for entry in data["choices"].values():
        assert entry["us"] > 0 and entry["date"] >= "2026-11-26"
