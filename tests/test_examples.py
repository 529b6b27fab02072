"""Every example runs on a tiny model."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tests.cli.conftest import letters
from tests.models import tiny_llama

EXAMPLES = Path(__file__).parent.parent / "examples"


def load_example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_every_example_has_a_main() -> None:
    for path in EXAMPLES.glob("*.py"):
        assert callable(load_example(path.stem).main), path


def test_quickstart_compiles_trains_and_saves(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    quickstart = load_example("quickstart")
    sizes = quickstart.Sizes(
        calibration=(128, 32), test=(2, 16), train=(4, 16), train_batch=2, sampled=2
    )
    quickstart.run(tiny_llama(), letters(), tmp_path / "out", [4.0, 3.0], 2, sizes)
    for folder in ("4bit", "3bit", "3bit-trained"):
        assert (tmp_path / "out" / folder / "lowra.json").is_file()
    assert "LoRA at 3 bits: 2 training steps" in capsys.readouterr().out.replace("\n", " ")
