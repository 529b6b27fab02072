"""Manifests that are sealed and lie: a pool names the file and the field, and holds nothing."""

from __future__ import annotations

import copy
import functools
import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lowra.compiler.errors import AdapterError
from lowra.runtime import packed_adapter_files as packed
from lowra.runtime import trained_adapter as trained
from lowra.runtime.manifest import manifest_checksum
from lowra.runtime.serving.pool import AdapterPool
from tests.runtime.served_models import folder, llama, pool_of

Edit = Callable[[dict[str, Any]], object]


@functools.cache
def of_kind(kind: str) -> Path:
    """A folder of one linear."""
    path = Path(tempfile.mkdtemp(prefix="lowra-kinds-")) / "a"
    options = {"rank": 3} if kind == "lora-xs" else {"rank": 3, "count": 2}
    adapter = trained.new_adapter(llama().compiled, kind, ("*q_proj",), **options)
    return trained.save_trained(adapter, llama().compiled, path)


def lying(source: Path, name: str, edit: Edit, target: Path) -> Path:
    """A copy of a folder whose manifest was edited and sealed again."""
    shutil.copytree(source, target)
    manifest = json.loads((target / name).read_text())
    edit(manifest)
    manifest["checksum"] = manifest_checksum(manifest)
    (target / name).write_text(json.dumps(manifest))
    return target


def field(name: str, value: Any) -> Edit:
    return lambda manifest: manifest.update({name: value})


def site(key: str, value: Any) -> Edit:
    """A field of every site; of its options where the key says so."""

    def edit(manifest: dict[str, Any]) -> None:
        for entry in manifest["sites"].values():
            inner = entry["options"] if key.startswith("options.") else entry
            inner[key.removeprefix("options.")] = copy.deepcopy(value)

    return edit


BOTH: dict[str, tuple[Edit, str]] = {
    "a site without entries": (field("sites", {"x": {}}), r"sites\.x\.n is None"),
    "a list of sites": (field("sites", []), r"sites is \[\]"),
    "no site": (field("sites", {}), r"sites is \{\}"),
    "a site that is a number": (field("sites", {"x": 3}), r"sites\.x is 3"),
    "a size in words": (site("n", "64"), r"_proj\.n is '64'"),
    "a size below one": (site("k", -64), r"_proj\.k is -64"),
    "half a base": (field("base", {"model": "a"}), r"base is \{'model': 'a'\}"),
    "a base of numbers": (field("base", {"model": 1, "packed": 2}), r"base is \{'model': 1"),
    "a base that is a list": (field("base", ["model", "packed"]), r"base is \['model'"),
    "checksums that are a number": (field("checksums", 1), r"checksums is 1"),
}
PACKED: dict[str, tuple[Edit, str]] = {
    **BOTH,
    "a config that is a list": (field("peft_config", []), r"peft_config is \[\]"),
    "a group in words": (field("group", "all"), r"group is 'all'"),
    "segments that are a number": (site("a", 3), "broken entry"),
    "a scaling beyond floats": (site("scaling", 10**400), "broken entry"),
}
KIND: dict[str, tuple[Edit, str]] = {
    **BOTH,
    "no base": (field("base", {}), r"base is \{\}"),
    "a kind that is a list": (field("kind", ["nola"]), r"of kind \['nola'\]"),
    "no options": (site("options", None), r"q_proj\.options is None"),
    "other options": (site("options", {"ranks": 3}), r"q_proj\.options is \{'ranks': 3\}"),
    "a huge rank": (site("options.rank", 10**12), r"rank is 1000000000000; give .* 1 to 64"),
    "a rank in words": (site("options.rank", "3"), "rank is '3'"),
}
MADE_ANEW: dict[str, tuple[Edit, str]] = {
    **KIND,
    "a huge count": (site("options.count", 10**9), "q_proj is missing or broken"),
    "a count that is true": (site("options.count", True), "count is True"),
    "a negative seed": (site("options.seed", -1), "seed is -1"),
}
CASES = [
    *(("packed", name, *case) for name, case in PACKED.items()),
    *(("nola", name, *case) for name, case in MADE_ANEW.items()),
    ("nola", "an endless scaling", site("options.scaling", float("inf")), "scaling is inf"),
    ("multi-lora", "a huge count", *MADE_ANEW["a huge count"]),
    ("lora-xs", "a rank in words", *KIND["a rank in words"]),
    ("lora-xs", "another rank", site("options.rank", 4), "r of .*q_proj is missing or broken"),
]


@pytest.mark.parametrize(
    ("kind", "edit", "words"),
    [(c[0], *c[2:]) for c in CASES],
    ids=[f"{c[0]}-{c[1]}" for c in CASES],
)
def test_a_manifest_that_lies_is_named(kind: str, edit: Edit, words: str, tmp_path: Path) -> None:
    source = folder("packed-lora") if kind == "packed" else of_kind(kind)
    name = packed.MANIFEST if kind == "packed" else trained.MANIFEST
    path = lying(source, name, edit, tmp_path / "a")
    pool = pool_of(llama().compiled, "lora")
    for options in ({}, {"replace": True}):
        with pytest.raises(AdapterError, match=words) as caught:
            pool.add("lora" if options else "a", path, pin=True, **options)
        assert str(path) in str(caught.value)
    assert pool.names == ("lora",) and pool.status().used_bytes == 0
    with pool.use("lora"):
        pass


@pytest.mark.parametrize("kind", ["lora", "packed-lora", "nola"])
def test_a_folder_without_its_tensors_is_named(kind: str, tmp_path: Path) -> None:
    shutil.copytree(of_kind(kind) if kind == "nola" else folder(kind), tmp_path / "a")
    next(tmp_path.glob("a/*.safetensors")).unlink()
    pool = AdapterPool(llama().compiled, 1 << 20)
    with pytest.raises(AdapterError, match=r"(lacks|holds no) adapter_\w+\.safetensors"):
        pool.add("a", tmp_path / "a")
    assert not len(pool)
