"""A captured program computes what its model computes, at every size; the model is left alone."""

from __future__ import annotations

import copy
import logging
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from lowra.compiler.capture import capture, find_weights, fingerprint_of, first_tensor
from lowra.compiler.errors import CaptureError, PipelineError
from lowra.compiler.program import Program
from tests.compiler.captured import MODELS, captured, three_products
from tests.models import plain_mlp, tokens


def masked(model: nn.Module, batch: int, length: int) -> dict[str, Tensor]:
    """Random inputs, the first row padded on the left by a third."""
    inputs = tokens(model, batch, length, seed=batch + length)
    if "attention_mask" in inputs:
        inputs["attention_mask"][0, : length // 3] = 0
    if "decoder_input_ids" in inputs:  # the two lengths differ in practice
        inputs["decoder_input_ids"] = inputs["decoder_input_ids"][:, : length // 2 + 1]
    return inputs


def assert_same_output(model: nn.Module, program: Program, inputs: dict[str, Tensor]) -> None:
    with torch.no_grad():
        want = first_tensor(model(**inputs))
        got = program.module()(*inputs.values())
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_program_equals_the_model_at_other_sizes_and_with_padding(name: str) -> None:
    model, program = captured(name)
    assert program.graph is not None and program.warning == ""
    for batch, length in ((1, 7), (3, 11), (1, 1)):
        assert_same_output(model, program, masked(model, batch, length))


@pytest.mark.parametrize("name", MODELS)
def test_every_tensor_of_the_graph_is_the_models_own(name: str) -> None:
    model, program = captured(name)
    own = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    assert program.graph is not None
    read = {node.target for node in program.graph.nodes if node.op == "get_attr"}
    assert read == set(program.tensors)
    for key, tensor in program.tensors.items():
        if key in own:
            assert tensor.data_ptr() == own[key].data_ptr()
    missing = {key for key in program.tensors if key not in own}
    assert all(program.tensors[key].numel() <= 1 for key in missing), missing


def test_tied_weights_appear_once_under_their_first_name() -> None:
    _, program = captured("gpt2")
    weights = {weight.name: weight for weight in program.weights}
    assert "lm_head.weight" not in weights and "lm_head.weight" not in program.tensors
    tied = weights["transformer.wte.weight"]
    assert tied.owners == (("transformer.wte", "embedding"), ("lm_head", "linear"))
    assert tied.head and tied.modules("linear") == ("lm_head",)


def test_weights_name_their_kinds() -> None:
    kinds = {w.name: w.owners[0][1] for w in captured("gpt2")[1].weights}
    assert kinds["transformer.h.0.attn.c_attn.weight"] == "conv1d"
    assert kinds["transformer.wpe.weight"] == "embedding"
    assert {w.name: w.owners[0][1] for w in find_weights(three_products()[0])} == {
        "mix": "other", "up.weight": "linear", "down.weight": "linear",
    }  # fmt: skip


SEEN: list[tuple[bool, bool, bool]] = []


class Watched(nn.Module):
    """Looks like a Hugging Face model with a cache; notes the state it is traced in."""

    def __init__(self, broken: bool = False) -> None:
        super().__init__()
        self.config = SimpleNamespace(use_cache=True)
        self.up, self.drop, self.down = nn.Linear(8, 8), nn.Dropout(), nn.Linear(8, 8)
        self.broken = broken

    def forward(self, x: Tensor) -> Tensor:
        SEEN.append((self.training, self.config.use_cache, torch.is_grad_enabled()))
        if self.broken:
            raise RuntimeError("this forward never works")
        return self.down(self.drop(self.up(x)))


@pytest.mark.parametrize("broken", [False, True])
def test_model_keeps_its_training_flags_and_cache_setting(broken: bool) -> None:
    SEEN.clear()
    model = Watched(broken).train()
    model.drop.eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    program = capture(model, (torch.randn(2, 8),))
    assert set(SEEN) == {(False, False, False)}
    assert [m.training for m in model.modules()] == [True, True, False, True]
    assert model.config.use_cache is True
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert (program.graph is None) == broken


class Undecided(nn.Module):
    """Its control flow depends on values, which no export can follow."""

    def __init__(self) -> None:
        super().__init__()
        self.yes, self.no = nn.Linear(8, 4), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.yes(x) if x.sum() > 0 else self.no(x)


def test_model_that_cannot_be_exported_is_captured_from_its_module_tree(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = Undecided()
    with caplog.at_level(logging.WARNING, logger="lowra"):
        program = capture(model, (torch.randn(2, 8),))
    assert program.graph is None and program.source is model
    assert program.warning.startswith("torch.export failed with ")
    assert "\n" not in program.warning
    said = [record.getMessage() for record in caplog.records if record.name == "lowra"]
    assert said == [f"captured from the module tree, without a graph: {program.warning}"]
    assert [weight.name for weight in program.weights] == ["yes.weight", "no.weight"]
    assert program.fingerprint == fingerprint_of(dict(model.named_parameters()))
    with pytest.raises(PipelineError, match="no dataflow to run: torch.export failed"):
        program.module()


def test_model_without_example_inputs_is_captured_from_its_module_tree() -> None:
    program = capture(plain_mlp())
    assert program.graph is None and program.warning == "no example inputs to trace with"


def test_inputs_may_be_given_by_name() -> None:
    model = plain_mlp()
    program = capture(model, {"x": torch.randn(2, 3, 33)})
    assert program.inputs == ("x",)
    assert_same_output(model, program, {"x": torch.randn(5, 1, 33)})


class Returns(nn.Module):
    """Returns what it is told to make of x."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.up, self.kind = nn.Linear(8, 4), kind

    def forward(self, x: Tensor) -> object:
        y = self.up(x)
        outputs = {"tensor": y, "tuple": (y, x), "list": [y], "dict": {"y": y}, "empty": ()}
        return outputs[self.kind]


@pytest.mark.parametrize("kind", ["tensor", "tuple", "list"])
def test_first_tensor_stands_for_the_output(kind: str) -> None:
    model, x = Returns(kind), torch.randn(3, 8)
    program = capture(model, (torch.randn(2, 8),))
    torch.testing.assert_close(program.module()(x), model.up(x))


@pytest.mark.parametrize("kind", ["dict", "empty"])
def test_output_without_a_first_tensor_is_refused(kind: str) -> None:
    with pytest.raises(CaptureError, match="holds no first tensor"):
        capture(Returns(kind), (torch.randn(2, 8),))


def test_fingerprint_changes_with_one_value_and_with_a_name() -> None:
    model = plain_mlp()
    first = capture(model).fingerprint
    assert capture(copy.deepcopy(model)).fingerprint == first
    with torch.no_grad():
        model.down.bias[3] += 1e-7
    assert capture(model).fingerprint != first
    tensors = {"a": torch.zeros(4), "b": torch.ones(4)}
    prints = {
        fingerprint_of(tensors),
        fingerprint_of({"a": torch.zeros(4), "c": torch.ones(4)}),
        fingerprint_of({"a": torch.zeros(2, 2), "b": torch.ones(4)}),
        fingerprint_of({"a": torch.zeros(4, dtype=torch.int32), "b": torch.ones(4)}),
        fingerprint_of({"a": torch.ones(4), "b": torch.zeros(4)}),
    }
    assert len(prints) == 5
    assert fingerprint_of(dict(reversed(tensors.items()))) == fingerprint_of(tensors)


def test_fingerprint_reads_every_dtype_and_layout() -> None:
    half = torch.arange(6).view(2, 3).to(torch.bfloat16)
    assert fingerprint_of({"a": half.T.contiguous().T}) == fingerprint_of({"a": half})
    assert fingerprint_of({"a": torch.tensor(1.0)}) != fingerprint_of({"a": torch.tensor([1.0])})
