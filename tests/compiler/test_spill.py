"""Intermediate tensors on disk: made once, whole or absent."""

from __future__ import annotations

import errno
import gc
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from torch import Tensor

from lowra.compiler import spill as spill_module
from lowra.compiler.errors import OutputError
from lowra.compiler.spill import Spill, StoredTensor, read_tensors, write_tensors


class Counted:
    """Makes a tensor, and counts how often it had to."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self) -> dict[str, Tensor]:
        self.calls += 1
        return {"w": torch.arange(6.0).view(2, 3).T, "b": torch.ones(2, dtype=torch.bfloat16)}


def refuse(*_: Any) -> NoReturn:
    raise AssertionError("made again")


def test_tensors_are_made_once_and_read_again(tmp_path: Path) -> None:
    make = Counted()
    first = Spill(tmp_path).tensors(("a", "b"), make)
    again = Spill(tmp_path).tensors(("a", "b"), make)
    assert make.calls == 1 and set(again) == {"w", "b"}
    assert torch.equal(again["w"], first["w"]) and again["b"].dtype == torch.bfloat16


def test_every_part_of_a_key_counts(tmp_path: Path) -> None:
    spill = Spill(tmp_path)
    keys = [("a",), ("b",), ("a", "b"), ("ab",), ("a", "", "b"), ("b", "a")]
    assert len({spill.path(*key) for key in keys}) == len(keys)
    assert all(spill.path(*key).parent == tmp_path for key in [("..", "..", "etc"), ("/tmp",)])


def test_stored_tensor_is_read_on_demand(tmp_path: Path) -> None:
    write_tensors({"w": torch.eye(3), "x": torch.zeros(1)}, tmp_path / "t.safetensors")
    assert torch.equal(StoredTensor(tmp_path / "t.safetensors", "w").load(), torch.eye(3))
    assert set(read_tensors(tmp_path / "t.safetensors")) == {"w", "x"}


def test_temporary_folder_goes_with_the_spill() -> None:
    spill = Spill()
    folder = spill.folder
    spill.tensors(("a",), Counted())
    assert len(list(folder.iterdir())) == 1
    del spill
    gc.collect()
    assert not folder.exists()


def test_given_folder_is_made_and_stays(tmp_path: Path) -> None:
    spill = Spill(tmp_path / "deep" / "er")
    spill.tensors(("a",), Counted())
    del spill
    gc.collect()
    Spill(tmp_path / "deep" / "er").tensors(("a",), refuse)


def test_full_disk_is_said_in_words_and_leaves_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_out(tensors: Mapping[str, Tensor], path: Path) -> None:
        path.write_bytes(b"half a file")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(spill_module, "save_file", run_out)
    with pytest.raises(OutputError, match="the disk is full; free space or choose another folder"):
        Spill(tmp_path).tensors(("a",), Counted())
    assert list(tmp_path.iterdir()) == []


def test_other_failures_keep_their_reason_and_leave_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def deny(tensors: Mapping[str, Tensor], path: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(spill_module, "save_file", deny)
    with pytest.raises(OutputError, match="Permission denied"):
        Spill(tmp_path).tensors(("a",), Counted())
    assert list(tmp_path.iterdir()) == []


def test_work_that_fails_leaves_no_file_and_is_tried_again(tmp_path: Path) -> None:
    spill = Spill(tmp_path)
    with pytest.raises(AssertionError, match="made again"):
        spill.tensors(("a",), refuse)
    assert list(tmp_path.iterdir()) == []
    assert set(spill.tensors(("a",), Counted())) == {"w", "b"}


def test_a_program_that_is_done_compiling_cannot_spill() -> None:
    with pytest.raises(OutputError, match="cannot write"):
        Spill.closed().tensors(("a",), Counted())


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OutputError, match="for work files"):
        Spill(tmp_path / "file" / "folder")


def test_an_old_file_stays_whole_when_a_new_one_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "t.safetensors"
    write_tensors({"w": torch.eye(2)}, path)

    def run_out(tensors: Mapping[str, Tensor], target: Path) -> None:
        target.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(spill_module, "save_file", run_out)
    with pytest.raises(OutputError):
        write_tensors({"w": torch.zeros(2, 2)}, path)
    assert torch.equal(read_tensors(path)["w"], torch.eye(2))


def test_another_version_does_not_read_these_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = Spill(tmp_path).path("a", "b")
    monkeypatch.setattr(spill_module, "__version__", "9.9")
    assert Spill(tmp_path).path("a", "b") != here
