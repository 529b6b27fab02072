"""Which backend serves, where kernels come from, and what is said where there are none."""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib.util
import itertools
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

import lowra  # noqa: F401 - registers backends
from lowra.backends.triton import build, launch, linear, overlap, service, tuning, weight
from lowra.backends.triton.emit import arguments, emit
from lowra.backends.triton.keys import (
    Blocks,
    ExpandKey,
    GatherKey,
    LinearKey,
    RotateKey,
    RoundKey,
    ShrinkKey,
    ValuesKey,
    weight_key,
)
from lowra.backends.triton.schedule import (
    SHORTEST_PART,
    UNPACKED,
    choose,
    parts_of,
    unpacks,
)
from lowra.backends.triton.tables import PAST
from lowra.backends.triton.targets import INTERPRETER, TARGETS, cuda_target, hip_target
from lowra.backends.triton.weight import descriptors
from lowra.compiler.ops import DIRECT
from lowra.compiler.packing import row_words
from tests.backends.test_cpu_product import Shape, packed_of

WEIGHT = weight_key([4, 100, 3, 50, 9, 70, 1, 20], 640, -1, False, True)
KEYS = [
    LinearKey(TARGETS[1], WEIGHT, "bfloat16", Blocks(64, 16, 4, 4), 16, True, True, True),
    LinearKey(TARGETS[3], WEIGHT, "float32", Blocks(64, 16, 4, 4)),
    ValuesKey(TARGETS[0], WEIGHT, "float16", Blocks(32, 0, 4, 1)),
    ShrinkKey(TARGETS[1], "bfloat16", "float32", Blocks(16, 16, 4, 3), True),
    RotateKey(TARGETS[1], "bfloat16", 64, True),
    GatherKey(TARGETS[1], "bfloat16", Blocks(16, 16, 8, 2)),
    ExpandKey(TARGETS[3], "float16", "float32", Blocks(16, 32, 8, 2)),
    RoundKey(TARGETS[1], False, True, 4, Blocks(32, 0, 4, 1)),
    RoundKey(TARGETS[1], True, False, 256, Blocks(16, 0, 4, 1)),
]


def test_cuda_tensors_are_dispatched_to_this_backend() -> None:
    assert DIRECT["cuda"] is linear.forward
    for name in (
        "quantized_linear", "quantized_linear_lora", "dequantize", "input_gradient",
        "apply_adapters", "table_gradients", "feedback_codes", "descend_codes",
    ):  # fmt: skip
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"lowra::{name}", "CUDA")


def test_importing_lowra_imports_no_triton() -> None:
    code = "import lowra, sys; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_without_triton_plain_torch_serves_and_says_so_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "triton" else find(name)
    )
    monkeypatch.setenv(service.SWITCH, "on")
    service.explain.cache_clear()
    service.target_of.cache_clear()
    packed = packed_of(Shape(20, 96, (2, 4), block=32))
    x = torch.randn(3, 96)
    for _ in range(2):  # on a CPU device: what is asked of a device comes after
        y = linear.forward(x, packed.op_args(), None, None)
        torch.testing.assert_close(y, x @ packed.dequantize().T, rtol=1e-4, atol=1e-4)
    linear.backward(y, packed.op_args(), service.target_of(x.device))
    linear.unpacked(packed.op_args(), torch.float32, service.target_of(x.device))
    service.target_of.cache_clear()
    assert len(caplog.records) == 1 and "lowra[triton]" in caplog.text


@pytest.mark.parametrize(
    ("capability", "name"), [((7, 5), None), ((8, 6), "sm86"), ((9, 0), "sm90"), ((12, 0), "sm120")]
)
def test_targets_by_compute_capability(capability: tuple[int, int], name: str | None) -> None:
    target = cuda_target(*capability)
    assert (target and target.name) == name


@pytest.mark.parametrize(
    ("m", "panels", "unpacked"),
    [(256, (2, 8192), False), (257, (2, 8192), True), (65, (2, 8192), False),
     (256, (2, 4096, 1, 4096), False), (256, (2, 4096), True), (64, (2, 4096), False),
     (128, (12, 16384), False), (129, (12, 8192, 2, 8192), True)],
)  # fmt: skip
def test_many_tokens_meet_an_unpacked_weight(
    m: int, panels: tuple[int, ...], unpacked: bool
) -> None:
    key = weight_key([*panels], 4096, -1, False, False)
    half = torch.bfloat16
    assert unpacks(key, panels, m, half, 132, TARGETS[1]) is unpacked
    assert (choose(key, panels, 4096, m, half, 132, TARGETS[1]) == UNPACKED) is unpacked
    assert not unpacks(key, panels, m, half, 132, TARGETS[3])  # never measured on AMD


def test_targets_of_amd_devices() -> None:
    found = hip_target("gfx942:sramecc+:xnack-")
    assert found == TARGETS[3] and hip_target("gfx1100") is None


def test_an_old_device_is_declined_with_its_capability(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(service.SWITCH, "on")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 0))
    service.explain.cache_clear()
    service.target_of.cache_clear()
    assert service.target_of(torch.device("cuda:0")) is None
    service.target_of.cache_clear()
    assert "7.0" in caplog.text and "8.0" in caplog.text


def test_switched_off_no_kernel_serves(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(service.SWITCH, "off")
    service.explain.cache_clear()
    service.target_of.cache_clear()
    assert service.target_of(torch.device("cuda:0")) is None
    service.target_of.cache_clear()
    assert f"{service.SWITCH} is off" in caplog.text


def test_a_kernel_that_cannot_be_launched_is_said_once_and_plain_torch_serves(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    asked: list[object] = []

    def fail(*given: object) -> None:
        asked.append(given)
        raise RuntimeError("PTX was compiled with an unsupported toolchain\nmore")

    monkeypatch.setattr(launch, "anew_where_broken", fail)
    monkeypatch.setattr(launch, "processors", lambda device: 132)
    monkeypatch.setattr(service, "failures", {})
    service._say_failed.cache_clear()
    packed = packed_of(Shape(20, 96, (2, 4), block=32))
    dense, x, target = packed.dequantize(), torch.randn(3, 96), TARGETS[1]
    factors = (torch.randn(4, 96), torch.randn(20, 4), 0.5)
    for _ in range(2):
        y = linear.forward(x, packed.op_args(), None, factors, target)
        want = x @ dense.T + 0.5 * (x @ factors[0].T) @ factors[1].T
        torch.testing.assert_close(y, want, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(linear.backward(y, packed.op_args(), target), y @ dense,
                               rtol=1e-4, atol=1e-4)  # fmt: skip
    assert torch.equal(linear.unpacked(packed.op_args(), torch.float32, target), dense)
    assert len(asked) == len(service.failures) == 2  # the rotation, and what unpacks W
    assert len(caplog.records) == 1
    assert "unsupported toolchain" in caplog.text and f"{service.SWITCH}=off" in caplog.text
    assert "more" not in caplog.records[0].getMessage()


def test_a_kernel_without_room_in_shared_memory_leaves_the_others_serving(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Its own product is of an unpacked weight from then on; other numbers of tokens are fused."""
    real, asked = launch.run, Counter[str]()

    def run(launcher: launch.Launcher, *given: Any) -> None:
        service.refuse_failed(launcher.name)
        asked[launcher.name.split("-")[0]] += 1
        if launcher.name.startswith("linear") and given[0][1] > 1:
            raise service.KernelError(launcher.name, "OutOfResources: Required: 204800")
        real(launcher, *given)

    monkeypatch.setattr(launch, "run", run)
    monkeypatch.setattr(service, "failures", {})
    service._say_failed.cache_clear()
    packed = packed_of(Shape(20, 96, (2, 4)))
    dense = packed.dequantize()
    for m in (100, 100, 3):
        x = torch.randn(m, 96)
        y = linear.forward(x, packed.op_args(), None, None, INTERPRETER)
        torch.testing.assert_close(y, x @ dense.T, rtol=1e-4, atol=1e-4)
    assert asked == {"linear": 2, "values": 2}
    assert len(service.failures) == 1 and "Required: 204800" in caplog.text


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("no room"), RuntimeError("Triton Error [CUDA]: out of memory")],
)
def test_no_room_is_no_failure_of_a_kernel(
    error: RuntimeError, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(launch, "anew_where_broken", fail)
    monkeypatch.setattr(service, "failures", {})
    packed = packed_of(Shape(20, 96, (2, 4), block=32))
    with pytest.raises(type(error), match=r"no room|out of memory"):
        linear.unpacked(packed.op_args(), torch.float32, TARGETS[1])
    assert not service.failures


def test_kernels_are_launched_on_the_device_of_their_tensors(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    for name in ("cpu", "cuda:0"):
        assert isinstance(launch._current(torch.device(name)), contextlib.nullcontext)
    assert launch._current(torch.device("cuda:1")).idx == 1  # pyright: ignore


@pytest.mark.parametrize("key", KEYS, ids=lambda key: key.name.split("-")[0])
def test_emitting_is_pure_and_gives_python(key: Any) -> None:
    text = emit(key)
    assert text == emit(key) and text.startswith(f"# {key.name}\n")
    compile(text, key.name, "exec")
    for name in arguments(key):
        assert text.count(name) >= 2, f"{name} is never read"


def test_a_kernel_as_people_read_it(golden: Any) -> None:
    key = weight_key([4, 64, 2, 128], 512, -1, False, True)
    golden.check(emit(LinearKey(TARGETS[3], key, "bfloat16", Blocks(64, 16, 4, 2), 16)))


def test_a_file_in_the_override_folder_takes_the_place_of_what_is_emitted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(build.OVERRIDE, str(tmp_path))
    assert build.source_of(KEYS[0]) == emit(KEYS[0])
    (tmp_path / f"{KEYS[0].name}.py").write_text("# mine\n")
    assert build.source_of(KEYS[0]) == "# mine\n"


def test_a_damaged_source_file_is_written_anew(tmp_path: Path) -> None:
    path = build.written("name", "x = 1\n", tmp_path)
    path.write_bytes(b"\xff half")
    assert build.written("name", "x = 1\n", tmp_path) == path and path.read_text() == "x = 1\n"


def test_a_folder_that_cannot_be_written_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    path = build.written("name", "x = 1\n", tmp_path / "file" / "kernels")
    assert path.read_text() == "x = 1\n"


def test_many_at_once_write_one_whole_file(tmp_path: Path) -> None:
    text = "x = 1\n" * 10000
    with ThreadPoolExecutor(8) as pool:
        paths = set(pool.map(lambda _: build.written("name", text, tmp_path), range(40)))
    assert len(paths) == 1 and paths.pop().read_text() == text
    assert len(list(tmp_path.iterdir())) == 1


def test_descriptors_cover_every_row_once_and_every_word() -> None:
    panels, k = (4, 70, 3, 40, 9, 33, 1, 5), 700
    for own in (False, True):
        tiles = descriptors(panels, k, own, 32, torch.device("cpu")).tolist()
        rows = [stored + i for _, stored, count, *_ in tiles for i in range(count)]
        assert rows == list(range(sum(panels[1::2])))
        last = tiles[-1]
        assert last[3] + last[2] * row_words(k, 1) == sum(
            count * row_words(k, id) for id, count in zip(panels[0::2], panels[1::2], strict=True)
        )
        tables = {tile[5] for tile in tiles}
        assert len(tables) == (len(tiles) if own else 4)


def test_descriptors_say_how_many_rows_of_its_run_are_above_a_tile() -> None:
    tiles = descriptors((13, 150, 12, 40), 256, False, 32, torch.device("cpu")).tolist()
    assert [tile[PAST] for tile in tiles] == [0, 32, 0, 32, 0, 0, 32]


def test_the_interpreter_is_a_target_that_no_device_has() -> None:
    assert INTERPRETER not in TARGETS and not INTERPRETER.backend


def test_a_weight_is_looked_at_once_and_forgotten_with_its_codes() -> None:
    packed = packed_of(Shape(20, 96, (2, 4), block=32)).op_args()
    first = weight.weight_of(packed)
    assert weight.weight_of(packed).form is first.form
    again = weight.taken(packed, torch.float32)
    assert isinstance(again, weight.Weight) and again.form is first.form
    assert "int64" in str(weight.taken(packed, torch.int64))
    other = (packed[0], packed[1].clone(), *packed[2:])
    assert weight.weight_of(other).form is not first.form
    for m in range(3 * weight.MOST_PLANS):
        first.form.keep(m, m)
    assert 0 < len(first.form.plans) <= weight.MOST_PLANS
    place = id(packed[0])
    assert place in weight._forms
    del packed, other, first, again
    gc.collect()
    assert place not in weight._forms


def test_a_choice_that_is_kept_counts_no_more_once_tables_are_read_anew(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    taken = weight.weight_of(packed_of(Shape(20, 96, (2,))).op_args())
    device = torch.device("cpu")

    def choice() -> object:
        return tuning.choice_for(taken, 1, torch.float32, 0, TARGETS[1], device)

    before = choice()
    monkeypatch.setattr(tuning, "_choice", lambda *_: UNPACKED)
    assert choice() == before != UNPACKED
    monkeypatch.setattr(tuning, "table_of", functools.cache(lambda device: {}))
    monkeypatch.setattr(tuning, "_choice", functools.cache(lambda *_: UNPACKED))
    tuning.forget()
    assert choice() == UNPACKED


def test_no_part_of_a_sum_is_without_columns() -> None:
    for tiles, programs in itertools.product(range(130), (1, 3, 28, 32, 64, 128, 448)):
        parts = parts_of(programs, 256 * tiles, Blocks(64, 16, 4, 3), 132)
        share = -(-tiles // parts)  # as a kernel reckons
        assert parts == 1 or (parts - 1) * share < tiles and share >= SHORTEST_PART


def test_a_kernel_that_starts_early_waits_before_it_stores_sums_and_ends_every_product() -> None:
    """In a captured graph its sums may lie where what makes h keeps its own; and a product of sm_90
    that runs on reads registers of the next turn."""
    panels = weight_key([2, 64, 12, 64], 1024, -1, False, False)
    for rank, target in itertools.product((0, 16), TARGETS[:2]):
        blocks = Blocks(64, 16, 4, 3)
        early = target.overlaps
        text = emit(LinearKey(target, panels, "bfloat16", blocks, rank, False, True, early))
        loops, rest = text.split("tl.store(sums")
        assert (overlap.WAIT in loops) == (overlap.SIGNAL in loops) == early
        assert overlap.WAIT not in rest and overlap.SIGNAL not in rest
        products = loops.count("tl.dot(")
        assert products == 4 and loops.count("settled(tl.dot(") == (products if early else 0)
