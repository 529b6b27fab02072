"""Checkpoint folders written once; tests that damage one take a copy."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import lowra
from tests.runtime.compiled_models import compiled_stack, low_llama


@pytest.fixture(scope="session")
def stack_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of `compiled_stack`; read it only."""
    return lowra.save(compiled_stack().compiled, tmp_path_factory.mktemp("saved") / "stack")


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of `low_llama`; read it only."""
    return lowra.save(low_llama().compiled, tmp_path_factory.mktemp("saved") / "llama")


@pytest.fixture
def copied(tmp_path: Path) -> Callable[[Path], Path]:
    """A checkpoint folder of one's own, to damage."""
    return lambda folder: Path(shutil.copytree(folder, tmp_path / "copied"))
