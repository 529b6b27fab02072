"""lowra adapter compress, inspect, convert: one adapter, a folder of them, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.adapters.adapters import low_rank, peft_folder


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return peft_folder(tmp_path / "in")


def test_one_adapter_is_compressed_inspected_and_converted(lowra, adapter, tmp_path) -> None:
    said = lowra.json("adapter", "compress", adapter, tmp_path / "out", "--bits", 1.8)
    assert said["stored_bits"] <= 1.8 and said["method"] == "budget 1.8"
    about = lowra.json("adapter", "inspect", tmp_path / "out")
    assert about["kind"] == "packed" and about["stored_bits"] == said["stored_bits"]
    assert [s["name"] for s in about["sites"]] == [s["name"] for s in said["sites"]]
    lowra.json("adapter", "convert", tmp_path / "out", tmp_path / "plain")
    assert lowra.json("adapter", "inspect", tmp_path / "plain")["kind"] == "plain"


def test_tables_for_people(lowra, adapter, tmp_path) -> None:
    done = lowra("adapter", "compress", adapter, tmp_path / "out", "--loraquant", "3@0.9")
    assert done.exit_code == 0, done.output
    for words in ("layers.0.up", "stored bits", "loraquant 3@0.9 group 128 paper search", "wrote"):
        assert words in done.stdout
    for folder in (adapter, tmp_path / "out"):
        done = lowra("adapter", "inspect", folder)
        assert done.exit_code == 0 and "layers.0.down" in done.stdout


def test_text_is_written_with_a_packed_adapter(lowra, checkpoint, dense, tmp_path) -> None:
    """A checkpoint's folder is one of its own adapter; packed, it still knows its base."""
    lowra.json("adapter", "compress", checkpoint, tmp_path / "packed", "--bits", 2)
    run = ("Hi", "--tokens", 3, "--adapter", tmp_path / "packed")
    said = lowra.json("generate", checkpoint, *run)
    assert said["adapter"] == str(tmp_path / "packed") and said["text"]
    done = lowra("generate", dense, *run)
    assert done.exit_code == 9 and "not compiled" in done.stderr
    done = lowra("generate", checkpoint, "Hi", "--adapter", tmp_path / "no")
    assert done.exit_code == 9 and "no adapter at" in done.stderr


def test_a_folder_of_adapters_is_compressed_in_one_command(lowra, tmp_path) -> None:
    folder = tmp_path / "many"
    for seed, name in enumerate(("code", "math")):
        peft_folder(folder / name, [low_rank(name="up", seed=seed)])
    (folder / "notes").mkdir()
    said = lowra.json("adapter", "compress", folder, tmp_path / "out", "--bits", 2)
    assert [Path(one["path"]).name for one in said["adapters"]] == ["code", "math"]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["code", "math"]


def test_one_bad_adapter_does_not_stop_the_others_and_is_told(lowra, tmp_path) -> None:
    folder = tmp_path / "many"
    key = "base_model.model.up.lora_A.weight"
    bad = {key: torch.full((8, 160), torch.nan)}
    peft_folder(folder / "bad", [low_rank(name="up")], tensors=bad)
    peft_folder(folder / "good", [low_rank(name="up")])
    done = lowra("adapter", "compress", folder, tmp_path / "out", "--json")
    said = json.loads(done.stdout)
    assert done.exit_code == 9 and "NaN" in said["failed"][0]["reason"]
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["good"]


@pytest.mark.parametrize(
    ("code", "words", "options"),
    [
        (2, "cannot be met", ["--bits", "0.5"]),
        (2, "rho is 1.2", ["--loraquant", "2@1.2"]),
        (2, "is not BITS@RHO", ["--loraquant", "two"]),
        (2, "cannot stand beside", ["--loraquant", "2@0.8", "--bits", "2"]),
        (2, "cannot stand beside", ["--clip", "ste"]),
        (2, "group is 0", ["--group", "0"]),
    ],
)
def test_wrong_options(lowra, adapter, tmp_path, code, words, options) -> None:
    done = lowra("adapter", "compress", adapter, tmp_path / "out", *options)
    assert done.exit_code == code and words in " ".join(done.output.replace("│", " ").split())
    assert not (tmp_path / "out").exists()


def test_folders_that_hold_no_adapter(lowra, tmp_path) -> None:
    done = lowra("adapter", "compress", tmp_path, tmp_path / "out")
    assert done.exit_code == 9 and "a folder of such folders" in done.stderr
    done = lowra("adapter", "compress", tmp_path / "nowhere", tmp_path / "out")
    assert done.exit_code == 9 and "no adapter at" in done.stderr
    assert lowra("adapter", "convert", tmp_path, tmp_path / "out").exit_code == 9
