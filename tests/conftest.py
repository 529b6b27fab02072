"""What every test gets: no network, a fixed seed, golden texts."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny tensors: threads cost more than they give

import pytest
import torch

from tests.golden_text import FLAG, GoldenFile, GoldenPlugin

GOLDEN = pytest.StashKey[GoldenPlugin]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(FLAG, action="store_true", help="rewrite the golden files of the tests run")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[GOLDEN] = GoldenPlugin(config)
    config.pluginmanager.register(config.stash[GOLDEN], "golden")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> GoldenFile:
    """`golden.check(text)` compares with the file of this test; see `tests/golden_text.py`."""
    return request.config.stash[GOLDEN].file(request.node.nodeid)


@pytest.fixture
def no_half_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU is one without instructions for bfloat16 and float16."""
    halves = frozenset((torch.bfloat16, torch.float16))
    monkeypatch.setattr("lowra.compiler.half_products._slow_dtypes", lambda: halves)


@pytest.fixture
def everything_travels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is too small for `lowra.compiler.offload` to send it away."""
    for limit in ("LEAST_PRODUCT", "PER_ELEMENT", "LEAST_ELEMENTS"):
        monkeypatch.setattr(f"lowra.compiler.offload.{limit}", 0)


@pytest.fixture
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A home folder of lowra's for this test alone, and no tuning table of another."""
    from lowra.backends.triton import tuning

    monkeypatch.setenv("LOWRA_HOME", str(tmp_path))
    tuning.forget()
    yield
    tuning.forget()
