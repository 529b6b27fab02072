"""export: what it writes, and what it refuses to write."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, cast

import pytest
import torch

import lowra
from lowra.compiler.errors import CaptureError, OutputError
from lowra.runtime.module_view import quantized_linears
from tests.runtime.compiled_models import compiled_stack, output, stack


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return lowra.export(compiled_stack().compiled, tmp_path_factory.mktemp("out") / "stack.pt2")


def run(path: Path, x: torch.Tensor) -> torch.Tensor:
    module: Any = torch.export.load(path).module()
    with torch.no_grad():
        return module(x)


@pytest.mark.parametrize("shape", [(2, 8), (1, 1), (5, 3)])
def test_an_archive_gives_the_outputs_of_the_model_for_any_batch_and_length(
    archive: Path, shape: tuple[int, int]
) -> None:
    x = torch.randn(*shape, 64)
    expected = output(compiled_stack().compiled, {"x": x})
    torch.testing.assert_close(run(archive, x), expected, rtol=0, atol=1e-5)


def test_an_archive_holds_packed_weights_and_no_dense_ones(archive: Path) -> None:
    state = torch.export.load(archive).state_dict
    assert {"first.codes", "first.codebooks", "first.scales", "first.order"} <= set(state)
    assert "first.weight" not in state
    assert max(t.numel() for name, t in state.items() if t.is_floating_point()) < 64 * 64


def test_an_archive_keeps_the_ops_of_the_dialect(archive: Path) -> None:
    targets = [str(node.target) for node in torch.export.load(archive).graph.nodes]
    assert targets.count("lowra.quantized_linear_lora.default") == 3


def test_an_existing_file_is_refused_unless_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "model.pt2"
    path.write_text("mine")
    with pytest.raises(OutputError, match="exists"):
        lowra.export(compiled_stack().compiled, path)
    assert path.read_text() == "mine"
    assert lowra.export(compiled_stack().compiled, path, overwrite=True) == path
    assert run(path, torch.randn(1, 2, 64)).shape == (1, 2, 32)


def test_another_suffix_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"end the name in \.pt2"):
        lowra.export(compiled_stack().compiled, tmp_path / "model.bin")
    assert not list(tmp_path.iterdir())


def test_missing_parents_are_made(tmp_path: Path) -> None:
    assert lowra.export(compiled_stack().compiled, tmp_path / "a" / "b" / "m.pt2").is_file()


def test_a_parent_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot write"):
        lowra.export(compiled_stack().compiled, tmp_path / "file" / "m.pt2")


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_program: Any, path: Path) -> None:
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch.export, "save", full)
    with pytest.raises(OutputError, match="No space left"):
        lowra.export(compiled_stack().compiled, tmp_path / "m.pt2")
    assert not list(tmp_path.iterdir())


def test_a_model_without_a_graph_is_refused_with_the_cause(tmp_path: Path) -> None:
    compiled = lowra.compile(stack(), bit_budget=6, rank=2)
    with pytest.raises(CaptureError, match="no graph to run: no example inputs"):
        lowra.export(compiled, tmp_path / "m.pt2")
    assert not list(tmp_path.iterdir())


def test_a_trained_copy_is_exported_as_trained(tmp_path: Path) -> None:
    model = copy.deepcopy(compiled_stack().compiled)
    with torch.no_grad():
        for layer in quantized_linears(model).values():
            cast("torch.Tensor", layer.lora_B).add_(0.25)
    x = torch.randn(1, 2, 64)
    path = lowra.export(model, tmp_path / "m.pt2")
    torch.testing.assert_close(run(path, x), output(model, {"x": x}), rtol=0, atol=1e-4)
