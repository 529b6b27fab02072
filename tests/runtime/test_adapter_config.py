"""LoraConfig fields: exact scalings, and patterns that mean what PEFT takes them for."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowra.runtime.adapter_config import exact_alpha, is_target, make_config, rank_of, scaling_of


@given(alpha=st.floats(1e-3, 1e3), rank=st.integers(1, 512))
def test_an_alpha_over_a_rank_is_found_again(alpha: float, rank: int) -> None:
    """Whatever scaling some lora_alpha gave, the alpha that is written gives the same."""
    scaling = alpha / rank
    assert exact_alpha(scaling, rank) / rank == scaling


@given(alpha=st.integers(1, 256), rank=st.integers(1, 256))
def test_a_whole_alpha_stays_whole(alpha: int, rank: int) -> None:
    assert exact_alpha(alpha / rank, rank) == alpha
    assert isinstance(exact_alpha(alpha / rank, rank), int)


@given(alpha=st.integers(1, 256), rank=st.integers(1, 256))
def test_the_scaling_of_rslora_is_written_to_the_last_bit_or_the_one_before(
    alpha: int, rank: int
) -> None:
    scaling = alpha / math.sqrt(rank)
    assert abs(exact_alpha(scaling, rank) / rank - scaling) <= math.ulp(scaling)


NAMES = ["h.1", "h.11", "block.h.1", "hx1", "a+b"]


@given(
    sizes=st.dictionaries(
        st.sampled_from(NAMES),
        st.tuples(st.integers(1, 4), st.sampled_from([0.5, 1.0, 1.5])),
        min_size=1,
    )
)
def test_every_module_reads_its_own_rank_and_scaling(sizes: dict[str, tuple[int, float]]) -> None:
    """Also where one name is the end of another, or would match it as a regular expression."""
    config = make_config(sizes, NAMES, "Plain")
    for name, (rank, scaling) in sizes.items():
        assert rank_of(config, name) == rank
        assert scaling_of(config, name, rank) == scaling
    assert {name for name in NAMES if is_target(config, name)} == set(sizes)


def test_plain_names_stay_plain() -> None:
    config = make_config({"a.q": (4, 1.0), "a.k": (2, 1.0)}, ["a", "a.q", "a.k"], "XForCausalLM")
    assert config["target_modules"] == ["a.k", "a.q"]
    assert (config["r"], config["lora_alpha"]) == (4, 4)
    assert (config["rank_pattern"], config["alpha_pattern"]) == ({"a.k": 2}, {"a.k": 2})
    assert config["task_type"] == "CAUSAL_LM"


@pytest.mark.parametrize(("rslora", "scaling"), [(False, 16 / 9), (True, 16 / 3)])
def test_rslora_divides_by_the_root_of_the_rank(rslora: bool, scaling: float) -> None:
    assert scaling_of({"lora_alpha": 16, "use_rslora": rslora}, "q", 9) == scaling
