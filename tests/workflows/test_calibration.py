"""Calibration tokens: what is accepted, what is refused, and what a model writes itself."""

import copy
import io

import pytest
import torch
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, T5Config
from transformers import T5ForConditionalGeneration as T5

from lowra.compiler.errors import CalibrationError
from lowra.compiler.progress import record_stages, show_progress, stage
from lowra.workflows.calibration import as_token_batches, generate_calibration

VOCAB = 101


class LetterTokenizer:
    """One token per character."""

    def __call__(self, text):
        return {"input_ids": [ord(letter) % VOCAB for letter in text]}


def tiny_llama(**options):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        **options,
    )
    return LlamaForCausalLM(config)


def batches(calibration, tokenizer=None, tokens=64, context=8):
    return as_token_batches(calibration, tokenizer, VOCAB, tokens=tokens, context=context)


def test_texts_are_joined_by_blank_lines_and_cut():
    ids = batches(["ab" * 10, "cd" * 10], LetterTokenizer(), tokens=1000, context=8)
    stream = LetterTokenizer()("ab" * 10 + "\n\n" + "cd" * 10)["input_ids"]
    assert ids.dtype == torch.int64
    assert ids.flatten().tolist() == stream[:40]
    assert ids.shape == (5, 8)


def test_at_most_the_asked_tokens_are_used():
    assert batches(["a" * 500], LetterTokenizer(), tokens=30, context=8).shape == (3, 8)
    assert batches(torch.ones(9, 10, dtype=torch.int32), tokens=30).shape == (3, 10)
    assert batches(torch.ones(9, 10, dtype=torch.int64), tokens=4).shape == (1, 4)


def test_a_file_equals_its_text(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("hello world " * 9, encoding="utf-8")
    from_text = batches(["hello world " * 9], LetterTokenizer())
    assert torch.equal(batches(file, LetterTokenizer()), from_text)
    assert torch.equal(batches(str(file), LetterTokenizer()), from_text)


def test_a_short_text_makes_one_short_window():
    assert batches(["a" * 20], LetterTokenizer(), context=32).shape == (1, 20)


def test_iterables_of_one_length_are_stacked():
    rows = [torch.full((8,), i) for i in range(3)]
    assert torch.equal(batches(rows), torch.stack(rows))
    assert torch.equal(batches({"input_ids": row} for row in rows), torch.stack(rows))
    assert torch.equal(batches([{"input_ids": torch.stack(rows)}]), torch.stack(rows))
    assert torch.equal(batches([[1, 2], [3, 4]]), torch.tensor([[1, 2], [3, 4]]))


def test_endless_data_is_read_only_as_far_as_needed():
    def endless():
        while True:
            yield {"input_ids": torch.ones(2, 8, dtype=torch.int64)}

    assert batches(endless()).shape == (8, 8)


def test_padding_is_dropped_and_the_rest_joined():
    item = {
        "input_ids": torch.tensor([[1, 2, 0], [3, 0, 0], [4, 5, 6]]),
        "attention_mask": torch.tensor([[1, 1, 0], [1, 0, 0], [1, 1, 1]]),
    }
    assert batches([item], context=3).tolist() == [[1, 2, 3], [4, 5, 6]]


@pytest.mark.parametrize(
    ("calibration", "message"),
    [
        (None, "no calibration data"),
        ([], "empty"),
        (3, "is a int"),
        ("no-such.txt", "cannot read"),
        ("a sentence, no path", "not the path of a .txt"),
        (["a" * 15], "15 tokens"),
        (["a" * 40, 7], "item 1 is a int"),
        (torch.zeros(2, 8), "float32"),
        (torch.zeros(2, 8, dtype=torch.bool), "bool"),
        (torch.zeros(8, dtype=torch.int64), r"shape \[8\]"),
        (torch.zeros(0, 8, dtype=torch.int64), r"shape \[0, 8\]"),
        (torch.tensor([[1, 2], [3, 101]]), r"id 101 at \[1, 1\].*0\.\.100"),
        (torch.tensor([[1, -5], [3, 101]]), r"id -5 at \[0, 1\]"),
        ([torch.tensor([1]), torch.tensor([999])], r"item 1 holds the id 999"),
        ([{"text": "a"}], 'no "input_ids"'),
        ([object()], "item 0 is a object"),
        ([torch.zeros(2, 2, 2, dtype=torch.int64)], "item 0 has shape"),
        ([{"input_ids": [1, 2], "attention_mask": [0, 0]}], "nothing but padding"),
        ([{"input_ids": [1, 2], "attention_mask": [1]}], "a mask"),
    ],
)
def test_bad_data_is_refused(calibration, message):
    with pytest.raises(CalibrationError, match=message):
        batches(calibration, LetterTokenizer(), context=32)


def test_text_without_a_tokenizer_is_refused():
    with pytest.raises(CalibrationError, match="pass tokenizer="):
        batches(["some text"])


def test_a_foreign_tokenizer_is_refused():
    with pytest.raises(CalibrationError, match="tokenizer that belongs"):
        as_token_batches(["z" * 40], LetterTokenizer(), 5, tokens=32, context=8)


def test_sizes_must_be_positive():
    with pytest.raises(CalibrationError, match="tokens=0"):
        batches(["a"], LetterTokenizer(), tokens=0)


def test_generation_repeats_and_touches_nothing():
    model = tiny_llama(attention_dropout=0.5)
    model.train()
    model.model.layers[0].eval()
    flags = [module.training for module in model.modules()]
    config, generation = copy.deepcopy(model.config), copy.deepcopy(model.generation_config)
    torch.manual_seed(7)
    state = torch.get_rng_state()

    first = generate_calibration(model, tokens=200, context=20, seed=1, batch=4)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(8)
    second = generate_calibration(model, tokens=200, context=20, seed=1, batch=4)

    assert torch.equal(first, second)
    assert [module.training for module in model.modules()] == flags
    assert model.config.to_dict() == config.to_dict()
    assert model.generation_config.to_dict() == generation.to_dict()
    assert not torch.equal(first, generate_calibration(model, tokens=200, context=20, seed=2))


def test_generated_windows_start_with_bos_and_differ():
    ids = generate_calibration(tiny_llama(), tokens=320, context=16, seed=0)
    assert ids.shape == (20, 16)
    assert ids.dtype == torch.int64
    assert (ids[:, 0] == 1).all()
    assert ids[:, 1].unique().numel() > 8
    assert set(ids.unique().tolist()) <= set(range(VOCAB))


def test_a_model_without_bos_and_eos_starts_anywhere():
    model = tiny_llama(bos_token_id=None, eos_token_id=None)
    ids = generate_calibration(model, tokens=320, context=16, seed=0)
    assert ids[:, 0].unique().numel() > 8


def test_the_window_fits_the_positions_and_the_tokens():
    model = tiny_llama()
    assert generate_calibration(model, tokens=128, context=1000, seed=0).shape == (2, 64)
    assert generate_calibration(model, tokens=8, context=16, seed=0).shape == (1, 8)


def test_sampling_follows_the_distribution_of_the_model():
    model = tiny_llama(tie_word_embeddings=False)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    ids = generate_calibration(model, tokens=20_000, context=50, seed=0, batch=400)
    counts = torch.bincount(ids[:, 2:].flatten(), minlength=VOCAB).double()
    expected = counts.sum() / VOCAB
    assert ((counts - expected).abs() < 6 * expected.sqrt()).all()


def test_models_that_cannot_write_are_refused():
    bert = BertModel(
        BertConfig(vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
                   intermediate_size=8)
    )  # fmt: skip
    t5 = T5(T5Config(vocab_size=20, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2))
    for model, message in [
        (bert, "BertModel does not generate"),
        (t5, "encoder-decoder"),
        (torch.nn.Linear(2, 2), "Linear does not generate"),
    ]:
        with pytest.raises(CalibrationError, match=message):
            generate_calibration(model, tokens=16, context=8, seed=0)


def test_nan_and_bad_sizes_are_refused():
    model = tiny_llama()
    with pytest.raises(CalibrationError, match="temperature=0"):
        generate_calibration(model, tokens=16, context=8, seed=0, temperature=0)
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(CalibrationError, match="NaN"):
        generate_calibration(model, tokens=16, context=8, seed=0)


def test_progress_off_a_terminal_prints_nothing(capfd):
    with show_progress(), stage("work", 3) as progress:
        progress.advance()
        progress.advance(2)
    assert capfd.readouterr() == ("", "")


def test_progress_on_a_terminal_names_the_stage(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    screen = Terminal()
    monkeypatch.setattr("sys.stderr", screen)
    with show_progress(), stage("outer work", 2) as outer:
        with stage("inner work", None) as inner:
            inner.advance()
        outer.advance(2)
    assert "outer work" in screen.getvalue()
    assert "2/2" in screen.getvalue()


def test_stages_are_timed_and_summed_also_when_they_fail():
    with record_stages() as outer, record_stages() as inner:
        with stage("a", 1):
            pass
        once = inner["a"]
        with pytest.raises(ValueError), stage("a", 1):
            raise ValueError
    assert inner["a"] > once >= 0
    assert outer.keys() == inner.keys() == {"a"}
    with stage("b", 1):
        pass
    assert "b" not in outer
