"""No trust in files: whatever is wrong with a checkpoint is one CheckpointError."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

import lowra
from lowra.compiler.errors import CheckpointError
from lowra.runtime.manifest import manifest_checksum
from tests.runtime.compiled_models import STACK, compile_case, compiled_stack, output, stack

Copied = Callable[[Path], Path]
FILES = ("model.safetensors", "adapter_model.safetensors")


def flip(path: Path, bit: int) -> bytes:
    """Flip one bit of a file in place; returns what it held."""
    data = path.read_bytes()
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    path.write_bytes(changed)
    return data


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data(), name=st.sampled_from(FILES), head=st.booleans())
def test_one_flipped_bit_in_any_tensor_file_is_found(
    stack_folder: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, name: str,
    head: bool,
) -> None:  # fmt: skip
    """Half of the bits are drawn from the header, metadata included: it is short beside the
    tensors."""
    path = stack_folder / name
    content = path.read_bytes()
    size = 8 + int.from_bytes(content[:8], "little") if head else len(content)
    bit = data.draw(st.integers(0, 8 * size - 1))
    flip(path, bit)
    try:
        with pytest.raises(CheckpointError):
            lowra.load(stack_folder, stack())
    finally:
        path.write_bytes(content)


def test_checksums_of_headers_are_optional(copied: Copied, stack_folder: Path) -> None:
    """Checkpoints written before there were any are read as before."""
    folder = copied(stack_folder)
    manifest = json.loads((folder / "lowra.json").read_text())
    del manifest["headers"]
    manifest["checksum"] = manifest_checksum(manifest)
    (folder / "lowra.json").write_text(json.dumps(manifest))
    assert isinstance(lowra.load(folder, stack()), nn.Module)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("keep", [0, 7, 100, -1])
def test_a_truncated_tensor_file_is_found(
    copied: Copied, stack_folder: Path, name: str, keep: int
) -> None:
    folder = copied(stack_folder)
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[:keep])
    with pytest.raises(CheckpointError, match="damaged"):
        lowra.load(folder, stack())


def test_bytes_behind_the_last_tensor_are_found(copied: Copied, stack_folder: Path) -> None:
    folder = copied(stack_folder)
    path = folder / FILES[0]
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(CheckpointError, match="damaged"):
        lowra.load(folder, stack())


@pytest.mark.parametrize("name", FILES)
def test_a_missing_tensor_file_is_found(copied: Copied, stack_folder: Path, name: str) -> None:
    folder = copied(stack_folder)
    (folder / name).unlink()
    with pytest.raises(CheckpointError, match="lacks"):
        lowra.load(folder, stack())


def test_an_extra_tensor_is_found(copied: Copied, stack_folder: Path) -> None:
    folder = copied(stack_folder)
    save_file({"first.extra": torch.zeros(2)}, folder / "more.safetensors")
    with pytest.raises(CheckpointError, match=r"holds first\.extra, which it never wrote"):
        lowra.load(folder, stack())


def test_an_edited_tensor_is_found_by_name(copied: Copied, stack_folder: Path) -> None:
    folder = copied(stack_folder)
    with safe_open(folder / FILES[0], framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    tensors["first.scales"] = tensors["first.scales"] * 2
    save_file(tensors, folder / FILES[0])
    with pytest.raises(CheckpointError, match=r"first\.scales differs from its checksum"):
        lowra.load(folder, stack())


def test_a_tensor_stored_in_another_dtype_is_found(copied: Copied, llama_folder: Path) -> None:
    """Zeros, say, are the same bytes in either dtype."""
    folder = copied(llama_folder)
    path = folder / FILES[0]
    data = path.read_bytes()
    assert b'"lm_head.weight":{"dtype":"F32","shape":[128,64]' in data
    path.write_bytes(
        data.replace(
            b'"lm_head.weight":{"dtype":"F32","shape":[128,64]',
            b'"lm_head.weight":{"dtype":"I32","shape":[128,64]',
        )
    )
    with pytest.raises(CheckpointError, match="lm_head.weight differs from its checksum"):
        lowra.load(folder)


# --- pickle -------------------------------------------------------------------------------------


def test_a_pickle_in_the_folder_is_never_opened(copied: Copied, stack_folder: Path) -> None:
    """The pickle would make a file; the checkpoint loads as if it were not there."""
    folder = copied(stack_folder)
    marker = folder / "opened"
    pickle = f"cos\nmkdir\n(S'{marker}'\ntR.".encode()
    for name in ("pytorch_model.bin", "adapter_model.bin", "training_args.bin"):
        (folder / name).write_bytes(pickle)
    loaded = lowra.load(folder, stack())
    assert not marker.exists()
    inputs = compiled_stack().inputs
    assert torch.equal(output(loaded, inputs), output(compiled_stack().compiled, inputs))


def test_a_pickle_in_the_place_of_the_tensors_is_refused(
    copied: Copied, stack_folder: Path
) -> None:
    folder = copied(stack_folder)
    marker = folder / "opened"
    (folder / FILES[0]).write_bytes(f"cos\nmkdir\n(S'{marker}'\ntR.".encode())
    with pytest.raises(CheckpointError, match="damaged"):
        lowra.load(folder, stack())
    assert not marker.exists()


# --- lowra.json ---------------------------------------------------------------------------------


def edited(folder: Path, edit: Callable[[dict[str, Any]], Any], *, seal: bool = True) -> Path:
    """Edit lowra.json; `seal` writes its checksum anew, so that the checks behind it are met."""
    manifest = json.loads((folder / "lowra.json").read_text())
    edit(manifest)
    if seal:
        manifest["checksum"] = manifest_checksum(manifest)
    (folder / "lowra.json").write_text(json.dumps(manifest))
    return folder


def test_a_folder_without_a_manifest_is_no_checkpoint(copied: Copied, stack_folder: Path) -> None:
    folder = copied(stack_folder)
    (folder / "lowra.json").unlink()
    with pytest.raises(CheckpointError, match=r"holds no lowra\.json: not a lowra checkpoint"):
        lowra.load(folder, stack())


def test_a_folder_that_is_not_there_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not a lowra checkpoint"):
        lowra.load(tmp_path / "nowhere", stack())


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "3", '"x"', "{}", "\ufeff{}"])
def test_a_manifest_that_is_no_manifest_is_found(
    copied: Copied, stack_folder: Path, text: str
) -> None:
    folder = copied(stack_folder)
    (folder / "lowra.json").write_text(text)
    with pytest.raises(CheckpointError, match="cannot be read"):
        lowra.load(folder, stack())


def test_a_manifest_that_is_no_text_is_found(copied: Copied, stack_folder: Path) -> None:
    folder = copied(stack_folder)
    (folder / "lowra.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(CheckpointError, match="cannot be read"):
        lowra.load(folder, stack())


@pytest.mark.parametrize("version", [0, 4, "1", None, True, [2]])
def test_another_format_version_is_refused_with_the_way_out(
    copied: Copied, stack_folder: Path, version: object
) -> None:
    folder = edited(copied(stack_folder), lambda m: m.update(format_version=version))
    with pytest.raises(CheckpointError, match=r"this lowra reads 1, 2, 3\. Install the lowra that"):
        lowra.load(folder, stack())


@pytest.mark.parametrize("version", [1, 2])
def test_a_checkpoint_of_an_older_version_is_read(tmp_path: Path, version: int) -> None:
    """As it was written: rows of plain codes, and a recipe that does not say so."""
    plain = compile_case(stack, **STACK, trellis=False)

    def as_it_was(manifest: dict[str, Any]) -> None:
        manifest["format_version"] = version
        for holder in (manifest, manifest["plan"]):
            del holder["recipe"]["trellis"]
        for entry in manifest["sites"].values():
            if version == 1:
                del entry["correction"]

    folder = edited(lowra.save(plain.compiled, tmp_path / "old"), as_it_was)
    read = lowra.load(folder, stack())
    assert read.lowra.recipe["trellis"] is False
    assert torch.equal(output(read, plain.inputs), output(plain.compiled, plain.inputs))


@pytest.mark.parametrize(
    "key",
    ["sites", "checksums", "fingerprint", "recipe", "plan", "report"],
)
def test_a_manifest_that_lacks_a_part_is_refused(
    copied: Copied, stack_folder: Path, key: str
) -> None:
    folder = edited(copied(stack_folder), lambda m: m.pop(key))
    with pytest.raises(CheckpointError):
        lowra.load(folder, stack())


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n", -1),
        ("n", 65),
        ("n", 10**30),
        ("n", None),
        ("n", "many"),
        ("k", 0),
        ("k", 65),
        ("group", 0),
        ("group", 7),
        ("dtype", "int8"),
        ("dtype", None),
        ("modules", []),
        ("modules", ["nowhere"]),
        ("modules", ["last"]),
        ("embeddings", ["first"]),
        ("rank", -1),
        ("rank", 0),
        ("rank", 5),
        ("scaling", "big"),
        ("scaling", None),
        ("rotation", {"seed": 0, "block": 0}),
        ("rotation", {"seed": 0, "block": 3}),
        ("rotation", {"seed": 0, "block": 128}),
        ("rotation", None),
    ],
)
def test_a_site_that_does_not_fit_its_tensors_is_refused(
    copied: Copied, stack_folder: Path, field: str, value: object
) -> None:
    folder = edited(copied(stack_folder), lambda m: m["sites"]["first"].update({field: value}))
    with pytest.raises(CheckpointError):
        lowra.load(folder, stack())


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("rotation", {"seed": 1, "block": 64}),
        ("rotation", {"seed": 2**70, "block": 64}),
        ("scaling", 2.0),
        ("scaling", float("nan")),
        ("dtype", "bfloat16"),
    ],
)
def test_an_edit_that_fits_but_changes_outputs_is_found(
    copied: Copied, stack_folder: Path, field: str, value: object
) -> None:
    folder = edited(
        copied(stack_folder), lambda m: m["sites"]["first"].update({field: value}), seal=False
    )
    with pytest.raises(CheckpointError):
        lowra.load(folder, stack())


def test_a_site_that_was_removed_is_found(copied: Copied, stack_folder: Path) -> None:
    folder = edited(copied(stack_folder), lambda m: m["sites"].pop("first"))
    with pytest.raises(CheckpointError, match="does not fit the model"):
        lowra.load(folder, stack())


# --- the model it is loaded into ----------------------------------------------------------------


def test_a_plain_module_needs_a_skeleton(stack_folder: Path) -> None:
    with pytest.raises(CheckpointError, match=r"Stack.*pass lowra\.load\(path, model=...\)"):
        lowra.load(stack_folder)


def test_a_skeleton_of_another_class_is_refused(stack_folder: Path) -> None:
    with pytest.raises(CheckpointError, match="does not fit"):
        lowra.load(stack_folder, nn.Linear(3, 3))


def test_a_skeleton_of_another_shape_is_refused(stack_folder: Path) -> None:
    skeleton = stack()
    skeleton.norm = nn.LayerNorm(5)
    with pytest.raises(CheckpointError, match="does not fit"):
        lowra.load(stack_folder, skeleton)


@pytest.mark.parametrize(
    "edit",
    [
        {"architectures": ["Nothing"]},
        {"architectures": ["BertForMaskedLM"]},
        {"architectures": ["Trainer"]},
        {"architectures": None},
        {"num_hidden_layers": 2},
        {"model_type": "nothing"},
        {"hidden_size": "wide"},
        {"hidden_size": 128},
        {"vocab_size": 64},
    ],
    ids=str,
)
def test_a_config_that_does_not_fit_is_refused(
    copied: Copied, llama_folder: Path, edit: dict[str, Any]
) -> None:
    folder = copied(llama_folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | edit))
    with pytest.raises(CheckpointError):
        lowra.load(folder)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_a_broken_config_is_refused(copied: Copied, llama_folder: Path, name: str) -> None:
    folder = copied(llama_folder)
    (folder / name).write_text("{")
    with pytest.raises(CheckpointError):
        lowra.load(folder)


def test_a_missing_config_is_refused(copied: Copied, llama_folder: Path) -> None:
    folder = copied(llama_folder)
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match="LlamaForCausalLM"):
        lowra.load(folder)


def test_code_of_the_config_is_never_run(copied: Copied, llama_folder: Path) -> None:
    """auto_map with a module beside it is how a checkpoint brings code of its own."""
    folder = copied(llama_folder)
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text(f"open({str(folder / 'ran')!r}, 'w')\n")
    lowra.load(folder)
    assert not (folder / "ran").exists()
