"""Session: the program view answers as the module view does, and says what it was not given."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import nn

import lowra
from lowra.compiler.errors import CaptureError
from lowra.runtime import session
from lowra.runtime.module_view import quantized_linears
from tests import models
from tests.runtime.compiled_models import (
    compile_case,
    compiled_stack,
    low_llama,
    output,
    stack,
    tied_llama_with_head,
)


def moved(model: nn.Module) -> nn.Module:
    """The model after something that trains has moved its factors, in place."""
    with torch.no_grad():
        for layer in quantized_linears(model).values():
            cast("torch.Tensor", layer.lora_B).add_(0.25)
    return model


def test_inputs_are_taken_in_order_or_by_name() -> None:
    case = low_llama()
    session = lowra.Session(case.compiled)
    by_name = session(**case.inputs)
    assert torch.equal(session(*case.inputs.values()), by_name)
    assert torch.equal(
        session(case.inputs["input_ids"], attention_mask=case.inputs["attention_mask"]), by_name
    )
    torch.testing.assert_close(by_name, output(case.compiled, case.inputs), rtol=0, atol=1e-5)


def test_a_missing_attention_mask_is_all_ones() -> None:
    case = low_llama()
    session = lowra.Session(case.compiled)
    assert torch.equal(session(case.inputs["input_ids"]), session(**case.inputs))


def test_an_attention_mask_masks() -> None:
    case = low_llama()
    mask = case.inputs["attention_mask"].clone()
    mask[:, 0] = 0
    masked = {**case.inputs, "attention_mask": mask}
    session = lowra.Session(case.compiled)
    torch.testing.assert_close(
        session(**masked)[:, 1:], output(case.compiled, masked)[:, 1:], rtol=0, atol=1e-5
    )
    assert not torch.equal(session(**masked), session(**case.inputs))


@pytest.mark.parametrize("shape", [(1, 1), (1, 17), (5, 3)])
def test_any_batch_and_length_runs(shape: tuple[int, int]) -> None:
    case = low_llama()
    inputs = models.tokens(case.dense, *shape, seed=4)
    torch.testing.assert_close(
        lowra.Session(case.compiled)(**inputs), output(case.compiled, inputs), rtol=0, atol=1e-5
    )


def test_a_missing_or_unknown_input_is_named() -> None:
    session = lowra.Session(low_llama().compiled)
    with pytest.raises(CaptureError, match=r"input_ids, attention_mask; missing \['input_ids'\]"):
        session(attention_mask=torch.ones(1, 2, dtype=torch.int64))
    with pytest.raises(CaptureError, match=r"unknown \['pixels'\]"):
        session(torch.ones(1, 2, dtype=torch.int64), pixels=torch.ones(1))


def test_an_input_too_many_is_refused() -> None:
    case = compiled_stack()
    with pytest.raises(CaptureError):
        lowra.Session(case.compiled)(*case.inputs.values(), torch.ones(1))


def test_a_session_gives_no_gradients() -> None:
    case = compiled_stack()
    assert not lowra.Session(case.compiled)(*case.inputs.values()).requires_grad


def test_generate_is_the_greedy_continuation_of_the_module_view() -> None:
    case = low_llama()
    ids = case.inputs["input_ids"][:, :4]
    expected = ids
    for _ in range(6):
        following = output(case.compiled, {"input_ids": expected})[:, -1].argmax(-1, keepdim=True)
        expected = torch.cat((expected, following), 1)
    assert torch.equal(lowra.Session(case.compiled).generate(ids, max_new_tokens=6), expected)


def test_a_session_of_a_checkpoint_folder_answers_as_the_model_that_was_saved(
    llama_folder: Path,
) -> None:
    case = low_llama()
    expected = lowra.Session(case.compiled)(**case.inputs)
    assert torch.equal(lowra.Session(llama_folder)(**case.inputs), expected)
    assert torch.equal(lowra.Session(str(llama_folder))(**case.inputs), expected)


def test_a_session_of_a_loaded_model_answers_as_the_model(llama_folder: Path) -> None:
    case = low_llama()
    loaded = moved(lowra.load(llama_folder))
    torch.testing.assert_close(
        lowra.Session(loaded)(**case.inputs), output(loaded, case.inputs), rtol=0, atol=1e-5
    )


def test_a_model_without_a_graph_is_refused_with_the_cause() -> None:
    compiled = lowra.compile(stack(), bit_budget=6, rank=2)
    with pytest.raises(CaptureError, match="Stack has no graph to run: no example inputs"):
        lowra.Session(compiled)


def test_a_model_without_an_adapter_runs() -> None:
    case = compile_case(stack, bit_budget=6, rank=0)
    torch.testing.assert_close(
        lowra.Session(case.compiled)(*case.inputs.values()),
        output(case.compiled, case.inputs),
        rtol=0,
        atol=1e-5,
    )


def test_a_session_of_a_trained_copy_runs_the_copy() -> None:
    model = moved(copy.deepcopy(compiled_stack().compiled))
    inputs = compiled_stack().inputs
    torch.testing.assert_close(
        lowra.Session(model)(*inputs.values()),
        output(model, inputs),
        rtol=0,
        atol=1e-5,
    )


def test_a_session_follows_factors_that_are_trained_in_place_after_it_was_made() -> None:
    model = copy.deepcopy(compiled_stack().compiled)
    session, x = lowra.Session(model), compiled_stack().inputs["x"]
    before = session(x)
    moved(model)
    assert not torch.equal(session(x), before)
    torch.testing.assert_close(session(x), output(model, {"x": x}), rtol=0, atol=1e-5)


def test_a_session_of_a_trained_bfloat16_model_runs_what_was_trained() -> None:
    dense = stack().to(torch.bfloat16)
    x = torch.randn(2, 8, 64, dtype=torch.bfloat16)
    model = moved(lowra.compile(dense, example=(x,), bit_budget=6, rank=2))
    torch.testing.assert_close(lowra.Session(model)(x), output(model, {"x": x}))


def test_a_session_of_a_model_that_was_cast_runs_in_the_new_dtype() -> None:
    model = copy.deepcopy(compiled_stack().compiled).to(torch.float64)
    x = torch.randn(2, 8, 64, dtype=torch.float64)
    torch.testing.assert_close(lowra.Session(model)(x), output(model, {"x": x}))


def test_the_views_agree_on_a_compressed_tied_head() -> None:
    case = tied_llama_with_head()
    torch.testing.assert_close(
        lowra.Session(case.compiled)(**case.inputs),
        output(case.compiled, case.inputs),
        rtol=0,
        atol=1e-5,
    )


def test_a_loaded_plain_module_runs_and_exports_with_an_example(
    stack_folder: Path, tmp_path: Path
) -> None:
    case = compiled_stack()
    loaded: Any = lowra.load(stack_folder, stack())
    x = case.inputs["x"]
    want = output(loaded, {"x": x})
    for example in ({"x": x}, (x,)):
        torch.testing.assert_close(lowra.Session(loaded, example)(x), want)
    file = lowra.export(loaded, tmp_path / "stack.pt2", example={"x": x})
    torch.testing.assert_close(torch.export.load(file).module()(x), want)
    with pytest.raises(CaptureError, match="pass example="):
        lowra.Session(loaded)


def test_a_model_that_went_to_another_device_is_captured_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With the inputs that the compile was given."""
    case = compiled_stack()
    x, before = case.inputs["x"], lowra.Session(case.compiled)
    monkeypatch.setattr(session, "_moved", lambda model, program: True)
    after = lowra.Session(case.compiled)
    assert after.program.graph is not before.program.graph
    torch.testing.assert_close(after(x), before(x))


def test_a_program_knows_when_its_model_has_moved() -> None:
    case = compiled_stack()
    program = lowra.Session(case.compiled).program
    assert not session._moved(case.compiled, program)
    assert session._moved(copy.deepcopy(case.compiled).to("meta"), program)
