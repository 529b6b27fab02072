"""lowra adapter diff: a table for people, the same as data."""

from __future__ import annotations

from tests.adapters.adapters import low_rank, peft_folder


def test_two_adapters_are_compared(lowra, tmp_path) -> None:
    one = peft_folder(tmp_path / "one", [low_rank(name="up"), low_rank(name="down", seed=1)])
    lowra.json("adapter", "compress", one, tmp_path / "two", "--bits", 2)
    data = lowra.json("adapter", "diff", one, tmp_path / "two")
    assert [row["name"] for row in data["sites"]] == ["down", "up"]
    assert 0 < data["difference"] < 1
    done = lowra("adapter", "diff", one, tmp_path / "two")
    assert done.exit_code == 0, done.output
    for words in ("difference", "stored bits", "90 % in", "up"):
        assert words in done.stdout


def test_what_is_no_adapter_is_refused(lowra, tmp_path) -> None:
    one = peft_folder(tmp_path / "one")
    done = lowra("adapter", "diff", one, tmp_path)
    assert done.exit_code == 9 and "adapter_config.json" in done.stderr
