"""Passes as text and back, the contract between them, and what an error carries."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest
import torch

from lowra.compiler.correction import Correction
from lowra.compiler.errors import PipelineError, WeightError
from lowra.compiler.facts import (
    Adapter,
    AdapterRank,
    AdapterTuning,
    Assigned,
    BlockTuning,
    Codebooks,
    LayoutFits,
    ModelTuning,
    Packed,
    Precision,
    Statistics,
)  # fmt: skip
from lowra.compiler.layout import Layout
from lowra.compiler.pipeline import Pass, parse_pipeline, print_pipeline, run_pipeline
from lowra.compiler.program import Program, Site
from lowra.compiler.rotation import Rotation
from lowra.compiler.verify import verify
from lowra.passes import (
    PASSES,
    CollectStatistics,
    FitCodebooks,
    InitializeAdapters,
    NormalizeLinears,
    RotateInputs,
)
from tests.compiler.captured import normalized
from tests.compiler.packed_weights import Case, packed_with_dense

CHANGED: dict[type, Callable[[Any], Any]] = {
    bool: lambda value: not value,
    int: lambda value: value + 3,
    float: lambda value: value + 0.125,
    str: lambda value: f"not-{value}",
    tuple: lambda value: (1, 8) if value else ("model.layers.0.*", "re:q_proj$"),
}


def changed(kind: type[Pass]) -> Pass:
    """A pass with every option away from its default."""
    options = {f.name: CHANGED[type(f.default)](f.default) for f in dataclasses.fields(kind)}
    return kind(**options)


@pytest.mark.parametrize("kind", PASSES, ids=lambda kind: kind.name)
def test_a_pass_prints_and_parses_back(kind: type[Pass]) -> None:
    assert str(kind()) == kind.name
    assert parse_pipeline(kind.name, PASSES) == (kind(),)
    step = changed(kind)
    assert parse_pipeline(str(step), PASSES) == (step,)
    for field in dataclasses.fields(kind):
        one = kind(**{field.name: getattr(step, field.name)})
        assert parse_pipeline(str(one), PASSES) == (one,)
        assert f"{field.name}=" in str(one)


def test_the_whole_pipeline_prints_and_parses_back() -> None:
    for steps in (tuple(kind() for kind in PASSES), tuple(changed(kind) for kind in PASSES)):
        assert parse_pipeline(print_pipeline(steps), PASSES) == steps


def test_only_changed_options_are_printed() -> None:
    steps = (NormalizeLinears(ignore=("*.q_proj",)), RotateInputs(rule="never"), FitCodebooks())
    text = "normalize-linears{ignore=*.q_proj} rotate-inputs{rule=never} fit-codebooks"
    assert print_pipeline(steps) == text


def test_an_unknown_pass_names_the_nearest() -> None:
    with pytest.raises(PipelineError, match="no pass 'fit-codebook'; nearest: fit-codebooks"):
        parse_pipeline("normalize-linears fit-codebook", PASSES)


def test_an_unknown_option_names_the_nearest() -> None:
    with pytest.raises(
        PipelineError, match="pass fit-codebooks has no option 'width'; nearest: widths"
    ):
        parse_pipeline("fit-codebooks{width=1,2}", PASSES)


def test_a_pass_out_of_order_names_the_missing_fact_and_carries_the_program() -> None:
    _, program = normalized("mlp")
    steps = (RotateInputs(seed=2), FitCodebooks(widths=(2,)), CollectStatistics())
    with pytest.raises(PipelineError, match="site up has no Statistics: no earlier pass") as caught:
        run_pipeline(program, steps)
    in_pass, after, printed = caught.value.__notes__
    assert in_pass == "in pass: fit-codebooks{widths=2}"
    assert after == "after: normalize-linears rotate-inputs{seed=2}"
    assert printed.startswith("# normalize-linears rotate-inputs{seed=2}\nprogram(")


def test_an_error_of_the_model_carries_the_pass_but_not_the_program() -> None:
    @dataclass(frozen=True)
    class Refuse(Pass):
        name: ClassVar[str] = "refuse"

        def run(self, program: Program) -> Program:
            raise WeightError("a weight is bad")

    _, program = normalized("mlp")
    with pytest.raises(WeightError) as caught:
        run_pipeline(program, (RotateInputs(), Refuse()))
    assert caught.value.__notes__ == [
        "in pass: refuse",
        "after: normalize-linears rotate-inputs",
    ]


@dataclass(frozen=True)
class Promise(Pass):
    """Declares a fact and writes none."""

    name: ClassVar[str] = "promise"
    writes: ClassVar = (Precision,)

    def run(self, program: Program) -> Program:
        return program


@dataclass(frozen=True)
class Unfinished(Pass):
    name: ClassVar[str] = "unfinished"


def test_a_pass_that_does_not_write_what_it_declares_is_refused() -> None:
    _, program = normalized("mlp")
    with pytest.raises(PipelineError, match="pass promise left up without Precision"):
        run_pipeline(program, (Promise(),))


def test_a_pass_without_run_is_refused_by_name() -> None:
    _, program = normalized("mlp")
    with pytest.raises(PipelineError, match="'unfinished' does not define run"):
        run_pipeline(program, (Unfinished(),))


def test_history_grows_and_observers_see_every_step() -> None:
    _, program = normalized("mlp")
    seen: list[tuple[str, tuple[str, ...]]] = []
    steps = (RotateInputs(rule="never"), CollectStatistics())
    done = run_pipeline(program, steps, lambda step, p: seen.append((step.name, p.history)))
    assert done.history == (
        "normalize-linears",
        "rotate-inputs{rule=never}",
        "collect-statistics",
    )
    assert seen == [("rotate-inputs", done.history[:2]), ("collect-statistics", done.history)]
    assert program.history == ("normalize-linears",), "the program that came in was changed"


def test_passes_are_frozen() -> None:
    for kind in PASSES:
        with pytest.raises(dataclasses.FrozenInstanceError):
            kind().name = "other"  # type: ignore[misc]


# --- verify ---------------------------------------------------------------------------------------


def _with(site: int, **changes: Any) -> Callable[[Program], Program]:
    def change(program: Program) -> Program:
        sites = list(program.sites)
        sites[site] = replace(sites[site], **changes)
        return replace(program, sites=tuple(sites))

    return change


def _fact(fact: object) -> Callable[[Program], Program]:
    return lambda program: program.with_facts({"up": [fact]})


def _books(rows: int) -> Codebooks:
    return Codebooks((2,), {2: torch.zeros(4)}, None, torch.zeros(rows, 1), 0, True)


GHOST = Site(
    name="ghost", weight="up.weight", n=47, k=33, transposed=False, dtype=torch.float32,
    modules=("ghost",),
)  # fmt: skip
PACKED = packed_with_dense(Case((2,) * 47, 32))[0]
BROKEN: dict[str, tuple[Callable[[Program], Program], str]] = {
    "node gone": (_with(0, nodes=("lost",)), "site up names node %lost, which is gone"),
    "no linear": (_with(1, nodes=("relu",)), "site down names node %relu, which is no linear"),
    "site twice": (lambda p: replace(p, sites=(*p.sites, p.sites[0])), "site up stands twice"),
    "fact on nothing": (
        lambda p: p.with_facts({"ghost": [Rotation()]}), "facts on ghost, which is no site",
    ),
    "tensor gone": (
        lambda p: replace(p, tensors={k: v for k, v in p.tensors.items() if k != "up.weight"}),
        "reads up.weight, which the program does not hold",
    ),
    "loss": (_fact(_books(46)), r"expected loss of up is \(46, 1\), not \(47, 1\)"),
    "widths": (_fact(Precision(torch.zeros(3))), r"precision of up is \(3,\), not \(47,\)"),
    "packed": (_fact(Packed(PACKED, 0, 1)), r"packed weight of up is \(47, 32\), not \(47, 33\)"),
    "adapter": (
        _fact(Adapter(torch.zeros(2, 32), torch.zeros(47, 3), 1.0, 0.0)),
        r"lora_a of up is \(2, 32\), not \(2, 33\); lora_b of up is \(47, 3\), not \(47, 2\)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", BROKEN)
def test_verify_names_a_broken_rule(what: str) -> None:
    _, program = normalized("mlp")
    breaks, message = BROKEN[what]
    verify(program)
    with pytest.raises(PipelineError, match=message):
        verify(breaks(program))


def test_a_pass_that_breaks_a_site_is_named() -> None:
    @dataclass(frozen=True)
    class Break(Pass):
        name: ClassVar[str] = "break"

        def run(self, program: Program) -> Program:
            return replace(program, sites=(*program.sites, GHOST, GHOST))

    _, program = normalized("mlp")
    with pytest.raises(PipelineError, match="ghost stands twice") as caught:
        run_pipeline(program, (Break(),))
    assert "in pass: break" in caught.value.__notes__


def test_every_pass_declares_facts_as_types() -> None:
    known = {
        Statistics, Codebooks, Precision, Assigned, AdapterRank, Packed, Correction, Adapter,
        Rotation, Layout, LayoutFits, BlockTuning, ModelTuning, AdapterTuning,
    }  # fmt: skip
    for kind in PASSES:
        assert set(kind.reads) | set(kind.writes) <= known
    assert InitializeAdapters.writes == (Packed,)  # a site of rank 0 has no Adapter
