"""The public functions: bad input is refused in words, and what a compiled model carries."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lowra
from lowra.compiler.capture import capture
from lowra.compiler.errors import (
    BudgetError,
    CalibrationError,
    CaptureError,
    PatternError,
    RecipeError,
    WeightError,
)
from tests import models
from tests.runtime.compiled_models import (
    STACK,
    Stack,
    compiled_stack,
    end_to_end,
    one_layer_llama,
    output,
    remembered_capture,
    stack,
)

X = torch.randn(2, 8, 64, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def _trace_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lowra.api.capture", remembered_capture)


def compile_stack(model: nn.Module | None = None, **options: Any) -> Any:
    return lowra.compile(stack() if model is None else model, **({"example": (X,)} | options))


# --- recipes ------------------------------------------------------------------------------------


def test_the_public_names_are_there_and_no_others_are_made_up() -> None:
    for name in lowra.__all__:
        assert getattr(lowra, name) is not None
    with pytest.raises(AttributeError, match="module 'lowra' has no attribute 'compres'"):
        lowra.compres  # noqa: B018 # pyright: ignore


@pytest.mark.parametrize(
    ("budget", "kind", "message"),
    [
        ("1.5", RecipeError, "bit_budget='1.5' is a str; give a number such as 1.5"),
        (True, RecipeError, "bit_budget=True is a bool"),
        (None, RecipeError, "bit_budget=None is a NoneType"),
        (-1, BudgetError, "bit_budget=-1 is not a positive number"),
        (0, BudgetError, "bit_budget=0 is not a positive number"),
        (float("nan"), BudgetError, "bit_budget=nan is not a positive number"),
        (float("inf"), BudgetError, "bit_budget=inf is not a positive number"),
    ],
)
def test_a_bad_budget_is_refused_by_compile_and_plan(
    budget: Any, kind: type[RecipeError], message: str
) -> None:
    for function in (lowra.compile, lowra.plan):
        with pytest.raises(kind, match=message):
            function(stack(), bit_budget=budget)


def test_a_budget_out_of_reach_is_refused_with_the_interval() -> None:
    for function in (lowra.compile, lowra.plan):
        with pytest.raises(
            BudgetError, match=r"bit_budget=0.5 is out of reach.*in 1\.\d{3} to \d+\.\d{3} bits"
        ):
            function(stack(), bit_budget=0.5, example=(X,))


@pytest.mark.parametrize("recipe", [{"bit_budget": 2}, 2, "default", lowra.Recipe])
def test_a_recipe_of_another_type_is_refused(recipe: Any) -> None:
    with pytest.raises(RecipeError, match=r"recipe is a \w+; pass lowra\.Recipe"):
        lowra.compile(stack(), recipe)


def test_no_recipe_and_no_budget_is_refused() -> None:
    with pytest.raises(RecipeError, match="a recipe needs bit_budget"):
        lowra.compile(stack())


def test_an_unknown_option_is_refused_with_the_nearest() -> None:
    with pytest.raises(RecipeError, match="no field 'bit_buget'; nearest: bit_budget"):
        lowra.compile(stack(), bit_buget=2)


def test_options_go_before_the_fields_of_a_recipe() -> None:
    recipe = lowra.Recipe(bit_budget=100, rank=4)
    compiled = compile_stack(recipe=recipe, rank=2)
    assert compiled.lowra.recipe["rank"] == 2
    assert compiled.lowra.recipe["bit_budget"] == 100
    assert recipe.rank == 4


# --- models -------------------------------------------------------------------------------------


def test_a_compiled_model_is_refused() -> None:
    with pytest.raises(RecipeError, match="compiled already; compile the dense model instead"):
        lowra.compile(compiled_stack().compiled, bit_budget=2)


def test_a_compiled_model_is_not_planned_again() -> None:
    with pytest.raises(RecipeError, match="compiled already"):
        lowra.plan(compiled_stack().compiled, bit_budget=2, example=(X,))


class Convolution(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv1d(4, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.convolution(x)


@pytest.mark.parametrize("model", [Convolution(), nn.Embedding(4, 4), nn.ReLU()])
def test_a_model_without_linears_is_refused(model: nn.Module) -> None:
    with pytest.raises(CaptureError, match="the model has no linear weights to compress"):
        lowra.compile(model, bit_budget=2)


def test_a_refusal_for_want_of_linears_says_what_there_was() -> None:
    with pytest.raises(CaptureError, match=r"\(convolution.weight: a tensor of 3 axes"):
        lowra.compile(Convolution(), bit_budget=2)


def test_ignoring_everything_leaves_nothing_to_compress() -> None:
    with pytest.raises(CaptureError, match="no linear weights.*ignored by the recipe"):
        compile_stack(bit_budget=2, ignore="*")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_weight_that_is_not_finite_is_refused_by_layer_and_place(value: float) -> None:
    model = stack()
    with torch.no_grad():
        model.middle.weight[3, 5] = value
    with pytest.raises(WeightError, match=rf"middle: weight\[3, 5\] is {value}; 1 values are not"):
        compile_stack(model, bit_budget=2)


def test_a_weight_that_is_not_finite_may_be_left_out() -> None:
    model = stack()
    with torch.no_grad():
        model.middle.weight[3, 5] = float("inf")
    with pytest.raises(CalibrationError, match="the input of last is not finite"):
        compile_stack(model, bit_budget=100, ignore="middle")
    compiled = lowra.compile(model, bit_budget=100, ignore="middle", rank=2)
    assert [site.name for site in compiled.lowra.sites] == ["first", "last"]


@pytest.mark.parametrize("option", ["include", "ignore"])
def test_a_pattern_that_matches_nothing_is_refused_with_the_nearest(option: str) -> None:
    with pytest.raises(PatternError, match=f"{option}='frist' matches no weight; nearest: first"):
        compile_stack(bit_budget=2, **{option: "frist"})


def test_a_pin_that_matches_nothing_is_refused_with_the_nearest() -> None:
    with pytest.raises(PatternError, match="pins='mid' matches no weight; nearest: middle"):
        compile_stack(bit_budget=2, pins={"mid": 4})


def test_a_pattern_that_is_no_regular_expression_is_refused() -> None:
    with pytest.raises(PatternError, match="is no regular expression"):
        compile_stack(bit_budget=2, ignore="re:(")


def test_globs_and_regular_expressions_choose_sites() -> None:
    for pattern in ("m*", "re:^mid"):
        compiled = compile_stack(bit_budget=100, ignore=pattern, rank=2)
        assert [site.name for site in compiled.lowra.sites] == ["first", "last"]
        assert compiled.lowra.report["skipped"] == [
            {"name": "middle.weight", "shape": [96, 64], "reason": "ignored by the recipe"}
        ]


def test_the_name_that_a_skipped_weight_is_listed_by_can_be_included() -> None:
    """A tied head is listed as model.embed_tokens.weight, with the advice to include it."""
    model = models.tiny_llama(tied=True, layers=1)
    skipped = lowra.plan(model, bit_budget=100).skipped
    name = next(s["name"] for s in skipped if "include it" in s["reason"])
    assert "lm_head" in [s["name"] for s in lowra.plan(model, bit_budget=100, include=name).sites]


@pytest.mark.parametrize("model", ["gpt2", None, 3])
def test_what_is_no_module_is_refused(model: Any) -> None:
    with pytest.raises(lowra.LowraError):
        lowra.compile(model, bit_budget=2)


def test_a_model_without_weights_is_planned_but_not_compiled() -> None:
    with torch.device("meta"):
        model = Stack()
    assert lowra.plan(model, bit_budget=100).fingerprint == ""
    with pytest.raises(CaptureError, match="first.weight is on the meta device"):
        lowra.compile(model, bit_budget=100)


# --- calibration --------------------------------------------------------------------------------


def ids(*shape: int) -> Tensor:
    return torch.randint(3, models.VOCAB, shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("calibration", "message"),
    [
        (ids(64), r"has shape \[64\]: give \[windows, context\]"),
        (ids(2, 2, 8), r"has shape \[2, 2, 8\]"),
        (ids(0, 8), r"has shape \[0, 8\]"),
        (ids(2, 0), r"has shape \[2, 0\]"),
        (ids(2, 8).float(), "has dtype torch.float32: give token ids, as int64"),
        (ids(2, 8).bool(), "has dtype torch.bool"),
        (torch.full((2, 8), models.VOCAB), r"the id 128 at \[0, 0\], outside the model's 0..127"),
        (torch.full((2, 8), -1), r"the id -1 at \[0, 0\], outside"),
        ([], "calibration data is empty"),
        (["some text"], "text needs a tokenizer"),
        ("text.pdf", "is not the path of a .txt file"),
        ("missing.txt", "cannot read the calibration file"),
        (5, "calibration is a int"),
        ([{"labels": [1, 2]}], 'item 0 has no "input_ids"'),
    ],
    ids=[
        "1-axis", "3-axes", "no-windows", "no-length", "float", "bool", "too-large", "negative",
        "empty", "no-tokenizer", "pdf", "no-file", "int", "no-ids",
    ],
)  # fmt: skip
def test_bad_token_calibration_is_refused(calibration: Any, message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        lowra.compile(one_layer_llama(), bit_budget=3, calibration=calibration)


@pytest.mark.parametrize(
    ("calibration", "message"),
    [
        ([], "calibration is empty"),
        (torch.zeros(0, 64), "must be non-empty tensors"),
        ([(X, X)], "a calibration batch has 2 tensors; the model takes 1: input_0"),
        (["text"], "must be non-empty tensors"),
        (torch.full((2, 64), float("nan")), "the input of first is not finite"),
    ],
    ids=["empty", "no-rows", "too-many", "text", "nan"],
)
def test_bad_tensor_calibration_is_refused(calibration: Any, message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        compile_stack(bit_budget=6, calibration=calibration)


@pytest.mark.parametrize(
    "calibration",
    [torch.zeros(2, 8, 63), torch.zeros(2, 8, 64, dtype=torch.int64), 5],
    ids=["width", "dtype", "int"],
)
def test_tensor_calibration_that_the_model_cannot_take_is_refused(calibration: Any) -> None:
    with pytest.raises(CalibrationError):
        compile_stack(bit_budget=6, calibration=calibration)


def test_calibration_in_the_preset_that_reads_none_is_refused() -> None:
    with pytest.raises(CalibrationError, match="preset 'lowra' is data-free"):
        compile_stack(bit_budget=2, preset="lowra", calibration=X)


def test_calibration_changes_the_result_and_its_order_of_batches_does_not_matter_much() -> None:
    generator = torch.Generator().manual_seed(1)
    batches = [torch.randn(4, 64, generator=generator) * scale for scale in (0.1, 3)]
    one, two, other = (
        compile_stack(bit_budget=3.5, rank=2, calibration=data)
        for data in (batches, batches[::-1], [X])
    )
    assert one.lowra.report["calibration_tokens"] == 8
    torch.testing.assert_close(one.first.weight, two.first.weight, rtol=0, atol=0.05)
    assert not torch.equal(one.first.weight, other.first.weight)


def test_a_model_that_cannot_write_its_own_text_is_compiled_data_free(
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert end_to_end("tiny_bert").compiled.lowra.report["calibration_tokens"] == 0  # pyright: ignore
    with caplog.at_level("WARNING", logger="lowra"):
        lowra.compile(stack(), bit_budget=6, rank=2)
    assert "captured from the module tree, without a graph: no example inputs" in caplog.text


# --- what a compiled model carries --------------------------------------------------------------


def test_a_compiled_model_carries_graph_text_plan_recipe_and_report() -> None:
    compiled: Any = compiled_stack().compiled
    info = compiled.lowra
    assert "lowra.quantized_linear_lora" in info.text()
    assert str(info.graph.code).count("quantized_linear_lora") == 3
    assert info.recipe == lowra.Recipe(**STACK).to_dict()
    assert len(info.fingerprint) == 64
    json.dumps([dict(info.plan), dict(info.recipe), dict(info.report)])


def test_a_compile_without_a_graph_has_text_and_no_graph() -> None:
    info = lowra.compile(stack(), bit_budget=6, rank=2).lowra
    assert info.graph is None
    assert "module tree, no dataflow: no example inputs" in info.text()


def test_the_fingerprint_is_that_of_the_dense_base() -> None:
    other = stack()
    with torch.no_grad():
        other.last.bias.add_(1)
    base: Any = compiled_stack().compiled
    assert capture(stack()).fingerprint == base.lowra.fingerprint
    assert capture(other).fingerprint != base.lowra.fingerprint


def test_an_example_may_be_given_by_name() -> None:
    compiled: Any = compile_stack(example={"x": X}, bit_budget=100, rank=2)
    assert compiled.lowra.program.inputs == ("x",)
    torch.testing.assert_close(
        lowra.Session(compiled)(x=X), output(compiled, {"x": X}), rtol=0, atol=1e-5
    )


def test_a_compile_is_independent_of_the_random_state_and_leaves_it_alone() -> None:
    torch.manual_seed(123)
    before = torch.get_rng_state()
    compiled = compile_stack(**STACK)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(7)
    again = compile_stack(**STACK)
    for name, tensor in compiled.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name


def test_a_model_in_training_mode_is_compiled_as_in_evaluation_mode() -> None:
    """Dropout must not enter the statistics, and the flag comes back."""

    class Dropping(Stack):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(nn.functional.dropout(x, 0.5, self.training))

    quiet, loud = Dropping().eval(), Dropping().train()
    loud.load_state_dict(quiet.state_dict())
    first, second = (compile_stack(model, bit_budget=3.5, rank=2) for model in (quiet, loud))
    assert loud.training and second.training and not first.training
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name]), name
