"""Every example runs on a tiny model."""

from __future__ import annotations

import copy
import importlib.util
import shutil
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from lowra.runtime.quantized_module import is_lora
from lowra.runtime.training import MARK
from tests.cli.conftest import letters
from tests.models import tiny_llama
from tests.runtime.compiled_models import low_llama

EXAMPLES = Path(__file__).parent.parent / "examples"


def load_example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_every_example_has_a_main() -> None:
    pytest.importorskip("trl")
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


def depths_of(model: nn.Module) -> set[int]:
    """How many dispatch modes each forward runs within, filled as they run."""
    found: set[int] = set()
    model.register_forward_hook(lambda *_: found.add(torch._C._len_torch_dispatch_stack()))
    return found


def training_forwards(model: nn.Module) -> list[None]:
    """An entry per forward in training mode, filled as they run."""
    found: list[None] = []
    model.register_forward_hook(lambda module, *_: found.append(None) if module.training else None)
    return found


@pytest.mark.usefixtures("no_half_instructions")
def test_quickstart_trains_within_half_products() -> None:
    model = copy.deepcopy(low_llama().compiled)
    depths = depths_of(model)
    load_example("quickstart").train_lora(model, torch.arange(12).view(2, 6), 1, 2)
    assert depths == {1}


def trained_checkpoint(out: Path) -> set[str]:
    """Names of the tensors that the last checkpoint of a run holds."""
    last = sorted((out / "checkpoints").glob("checkpoint-*"))[-1]
    return {*load_file(last / "model.safetensors")}


@pytest.mark.usefixtures("no_half_instructions")
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_finetune_trainer_trains_resumes_and_saves(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    example = load_example("finetune_trainer")
    text = "the cat sat on the mat, and so did the dog. " * 12
    model = copy.deepcopy(low_llama().compiled)
    depths = depths_of(model)
    found = example.run(model, letters(), text, tmp_path, steps=4, context=24)
    assert depths == {1}, "within half_products"
    assert found["after"] < found["before"]
    assert (tmp_path / "model" / "lowra.json").is_file()
    assert all(is_lora(name) or name == MARK for name in trained_checkpoint(tmp_path))
    shutil.rmtree(tmp_path / "checkpoints" / "checkpoint-4")
    fresh = copy.deepcopy(low_llama().compiled)
    steps = training_forwards(fresh)
    again = example.run(fresh, letters(), text, tmp_path, steps=4, context=24)
    assert len(steps) == 1, "it went on behind step 3"
    assert again["after"] == pytest.approx(found["after"], abs=1e-6)


@pytest.mark.usefixtures("no_half_instructions")
@pytest.mark.filterwarnings("ignore")
def test_finetune_trl_trains_and_saves(tmp_path: Path) -> None:
    pytest.importorskip("trl")
    example = load_example("finetune_trl")
    tokenizer = letters()
    tokenizer.add_special_tokens({"eos_token": "~", "pad_token": "`"})
    data = [{"text": f"{a} plus {b} is {a + b}."} for a in range(5) for b in range(8)]
    model = copy.deepcopy(low_llama().compiled)
    depths = depths_of(model)
    found = example.run(model, tokenizer, data, tmp_path, steps=4, max_length=32)
    assert depths == {1}, "within half_products"
    assert found["after"] < found["before"]
    assert (tmp_path / "model" / "lowra.json").is_file()
    assert all(is_lora(name) or name == MARK for name in trained_checkpoint(tmp_path))


def test_the_trl_example_reads_records_and_makes_its_own(tmp_path: Path) -> None:
    pytest.importorskip("trl")
    example = load_example("finetune_trl")
    assert example.records(None)[0]["messages"][1]["content"] == "2 plus 2 is 4."
    (tmp_path / "d.jsonl").write_text('{"text": "a"}\n\n{"text": "b"}\n')
    assert example.records(tmp_path / "d.jsonl") == [{"text": "a"}, {"text": "b"}]
    (tmp_path / "d.jsonl").write_text('{"text": "a\u2028b"}', encoding="utf-8")
    assert example.records(tmp_path / "d.jsonl") == [{"text": "a\u2028b"}]


def test_many_adapters_writes_with_each_in_one_batch(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    from tests.runtime.served_models import folder, llama

    example = load_example("many_adapters")
    folders = [folder("packed-wide"), folder("dora")]
    texts = example.run(llama().compiled, letters(), folders, "Hello", 6, 4)
    assert list(texts) == ["packed-wide", "dora", "the base"]
    assert all(text.replace(" ", "").startswith("Hello") for text in texts.values())
    assert len(set(texts.values())) == 3


def test_icm_lora_writes_adapters_that_help() -> None:
    example = load_example("icm_lora")
    model, encode = example.load(None)
    tasks = [encode(task) for task in example.TASKS[:3]]
    found = example.run(model, tasks, steps=30, epochs=150)
    gains = [
        sum(losses["base"] - losses[kind] for losses in found) for kind in ("trained", "written")
    ]
    assert gains[0] > gains[1] > 0.2 * gains[0] > 0
    start = example.factors_of(model)
    back = example.unflat(example.flat(start), start)
    assert all((a == back[name][0]).all() for name, (a, _, _) in start.items())
