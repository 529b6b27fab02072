"""A tiny Llama with a tokenizer on disk, one compiled checkpoint of it, and a way to run lowra."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from lowra.cli.app import app
from tests.models import VOCAB, tiny_llama

# Small and quick, the same for every compile of these tests.
QUICK = ["--bits", "3", "--calibration-tokens", "128", "--context", "32", "--dtype", "float32"]


def letters() -> PreTrainedTokenizerFast:
    """A tokenizer of one token per ASCII character, ids 0 to 127 as the models have."""
    vocab = {chr(code): code for code in range(VOCAB)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?")


class Lowra:
    """Runs the command line in this process."""

    def __call__(self, *words: object) -> Any:
        return CliRunner(env={"COLUMNS": None}).invoke(app, [str(word) for word in words])

    def json(self, *words: object, code: int = 0) -> Any:
        """The one JSON document on stdout of a run that ends with `code`."""
        done = self(*words, "--json")
        assert done.exit_code == code, done.output
        return json.loads(done.stdout)


@pytest.fixture(scope="session")
def lowra() -> Callable[..., Any]:
    return Lowra()


@pytest.fixture(scope="session")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny dense Llama and its tokenizer."""
    folder = tmp_path_factory.mktemp("models") / "dense"
    tiny_llama().save_pretrained(folder)
    letters().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def compiled(dense: Path, lowra: Lowra) -> tuple[Path, dict[str, Any]]:
    """A checkpoint of it, and what `lowra compile --json` said."""
    out = dense.parent / "compiled"
    return out, lowra.json("compile", dense, out, *QUICK)


@pytest.fixture
def no_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """Capture from the module tree, which takes a hundredth of the time of torch.export."""
    monkeypatch.setattr(
        "lowra.compiler.capture._try_export", lambda _, inputs: (None, tuple(inputs), "not tried")
    )


@pytest.fixture
def checkpoint(compiled: tuple[Path, dict[str, Any]]) -> Path:
    return compiled[0]
