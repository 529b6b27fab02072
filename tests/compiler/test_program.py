"""Programs share tensors, keep one fact of a kind, and name what they do not find."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lowra.compiler.errors import PatternError, PipelineError, nearest
from lowra.compiler.program import Program, Site, matches, select
from lowra.compiler.progress import record_stages, show_progress, stage
from lowra.compiler.rotation import Rotation
from tests.compiler.captured import normalized

NAMES = ["layers.0.q_proj", "layers.0.k_proj", "layers.10.q_proj", "head"]


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("*.q_proj", ["layers.0.q_proj", "layers.10.q_proj"]),
        ("layers.0.*", ["layers.0.q_proj", "layers.0.k_proj"]),
        ("head", ["head"]),
        ("HEAD", []),
        ("q_proj", []),
        ("re:q_proj$", ["layers.0.q_proj", "layers.10.q_proj"]),
        (r"re:^layers\.0\.", ["layers.0.q_proj", "layers.0.k_proj"]),
    ],
)
def test_a_pattern_is_a_glob_of_the_whole_name_or_a_regular_expression(
    pattern: str, found: list[str]
) -> None:
    assert [name for name in NAMES if matches(name, pattern)] == found


def test_select_joins_patterns_and_refuses_one_that_matches_nothing() -> None:
    assert select(NAMES, ["head", "*.k_proj"], "ignore") == {"head", "layers.0.k_proj"}
    assert select(NAMES, [], "ignore") == set()
    with pytest.raises(
        PatternError, match="ignore='layers.0.qproj' matches no weight; nearest: layers.0.q_proj"
    ):
        select(NAMES, ["head", "layers.0.qproj"], "ignore")


def test_nearest_names_something_whatever_the_word() -> None:
    assert nearest("zzz", NAMES) == f"nearest: {', '.join(NAMES[:3])}"
    assert nearest("zzz", []) == "there is none to choose from"


def test_a_fact_replaces_the_one_of_its_kind_in_a_new_program() -> None:
    _, program = normalized("mlp")
    first = program.with_facts({"up": [Rotation(1, 1)]})
    second = first.with_facts({"up": [Rotation(2, 1)], "down": [Rotation(3, 1)]})
    assert program.find("up", Rotation) is None
    assert first.fact("up", Rotation).seed == 1 and first.find("down", Rotation) is None
    assert second.fact("up", Rotation).seed == 2
    with pytest.raises(PipelineError, match="site down has no Rotation"):
        first.fact("down", Rotation)


def test_an_unknown_site_names_the_nearest() -> None:
    _, program = normalized("mlp")
    assert program.site("down").n == 20
    with pytest.raises(PatternError, match="no site 'dwn'; nearest: down"):
        program.site("dwn")


def test_a_transposed_weight_is_read_as_n_by_k() -> None:
    stored = torch.arange(6.0).view(2, 3).half()
    site = Site(
        name="a", weight="a.weight", n=3, k=2, transposed=True, dtype=torch.float16, modules=("a",)
    )
    program = Program(
        graph=None, inputs=(), tensors={"a.weight": stored}, weights=(), sites=(site,)
    )
    assert torch.equal(program.weight(site), stored.T.float())
    assert torch.equal(program.weight(replace(site, transposed=False, n=2, k=3)), stored.float())


def test_modules_of_one_program_share_its_tensors() -> None:
    model, program = normalized("mlp")
    first, second = program.module(), program.module()
    weight = dict(model.named_parameters())["up.weight"].data_ptr()
    assert first.get_parameter("up.weight").data_ptr() == weight
    assert second.get_parameter("up.weight").data_ptr() == weight


def test_stages_add_their_time_to_every_recorder_also_when_they_fail() -> None:
    with record_stages() as outer:
        with stage("a", 2) as bar:
            bar.advance()
            bar.advance(1)
        with record_stages() as inner, pytest.raises(ValueError), stage("b", None):
            raise ValueError
        with stage("a", None):
            pass
    with stage("c", None):
        pass
    assert set(outer) == {"a", "b"} and set(inner) == {"b"}
    assert all(seconds >= 0 for seconds in outer.values())


def test_progress_is_silent_without_a_terminal(capfd: pytest.CaptureFixture[str]) -> None:
    with show_progress(), stage("a", 3) as bar:
        bar.advance(3)
    assert capfd.readouterr() == ("", "")
