"""Perplexity and divergence against a direct float64 computation; texts and samples."""

import math

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM, LlamaConfig, LlamaForCausalLM

from lowra.compiler.errors import CalibrationError, LowraError
from lowra.workflows import evaluate as module
from lowra.workflows.evaluate import evaluate, held_out_english, sample, windows

VOCAB = 97


class LetterTokenizer:
    """One token per character."""

    def __call__(self, text):
        return {"input_ids": [ord(letter) % VOCAB for letter in text]}

    def decode(self, ids, skip_special_tokens=False):
        return " ".join(map(str, ids))


class Table(torch.nn.Module):
    """A bigram model that returns bare logits."""

    def __init__(self, logits):
        super().__init__()
        self.logits = torch.nn.Parameter(logits)

    def forward(self, ids):
        return self.logits[ids]


def tiny_llama(seed=0, vocab=VOCAB):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=1024,
        initializer_range=0.5,
    )
    return LlamaForCausalLM(config)


def tokens(count=3, context=40, vocab=VOCAB):
    generator = torch.Generator().manual_seed(5)
    return torch.randint(vocab, (count, context), generator=generator)


def direct(model, reference, ids):
    with torch.no_grad():
        found = model(ids).logits[:, :-1].double().log_softmax(-1)
        wanted = reference(ids).logits[:, :-1].double().log_softmax(-1)
    nll = -found.gather(2, ids[:, 1:, None]).mean()
    kl = (wanted.exp() * (wanted - found)).sum(-1).mean()
    return math.exp(nll), kl.item()


@pytest.mark.parametrize("batch", [1, 2, 4])
def test_equals_a_direct_computation(batch, monkeypatch):
    monkeypatch.setattr(module, "_CHUNK", 16)
    model, reference, ids = tiny_llama(0), tiny_llama(1), tokens()
    perplexity, kl = direct(model, reference, ids)
    result = evaluate(model, ids, reference=reference, batch=batch)
    assert result.perplexity == pytest.approx(perplexity, rel=1e-5)
    assert result.kl == pytest.approx(kl, rel=1e-5)
    assert (result.windows, result.context, result.tokens) == (3, 40, 117)
    assert result.seconds > 0


def test_without_a_reference_there_is_no_divergence():
    result = evaluate(tiny_llama(), tokens())
    assert result.kl is None
    assert result.to_dict()["kl"] is None
    assert set(result.to_dict()) == {
        "perplexity", "kl", "windows", "context", "tokens", "seconds",
    }  # fmt: skip


def test_a_model_beside_itself_does_not_diverge():
    model = tiny_llama()
    assert evaluate(model, tokens(), reference=model).kl == pytest.approx(0, abs=1e-9)


def test_training_flags_come_back():
    model = tiny_llama().train()
    model.model.layers[1].eval()
    flags = [part.training for part in model.modules()]
    evaluate(model, tokens(), reference=tiny_llama(1))
    assert [part.training for part in model.modules()] == flags


def test_plain_modules_and_impossible_tokens():
    logits = torch.zeros(VOCAB, VOCAB)
    logits[:, 90:] = -math.inf
    result = evaluate(Table(logits), tokens(vocab=90), reference=Table(logits))
    assert result.perplexity == pytest.approx(90)
    assert result.kl == 0
    assert evaluate(Table(logits), torch.full((1, 4), 95)).perplexity == math.inf


def test_encoders_and_bad_tokens_are_refused():
    bert = BertForMaskedLM(
        BertConfig(vocab_size=VOCAB, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
                   intermediate_size=8)
    )  # fmt: skip
    with pytest.raises(LowraError, match="perplexity needs a causal language model"):
        evaluate(bert, tokens())
    with pytest.raises(LowraError, match="perplexity needs a causal language model"):
        evaluate(torch.nn.Embedding(VOCAB, 4), tokens())
    model = tiny_llama()
    with pytest.raises(CalibrationError, match="evaluation data holds the id 97"):
        evaluate(model, torch.full((1, 4), VOCAB))
    with pytest.raises(CalibrationError, match="evaluation data has shape"):
        evaluate(model, torch.zeros(4, dtype=torch.int64))
    with pytest.raises(LowraError, match="2 tokens or more"):
        evaluate(model, torch.zeros(4, 1, dtype=torch.int64))


def test_two_vocabularies_are_refused():
    with pytest.raises(LowraError, match="97 logits and the reference 120"):
        evaluate(tiny_llama(), tokens(), reference=tiny_llama(vocab=120))


def test_windows_are_the_beginning_of_the_text():
    cut = windows("abcdefghij", LetterTokenizer(), count=3, context=3)
    assert cut.shape == (3, 3)
    assert cut.dtype == torch.int64
    assert cut.flatten().tolist() == LetterTokenizer()("abcdefghi")["input_ids"]


def test_a_short_text_says_how_many_tokens_it_has():
    with pytest.raises(LowraError, match=r"has 10 tokens.*need 12.*ask for 2 windows"):
        windows("abcdefghij", LetterTokenizer(), count=3, context=4)
    with pytest.raises(LowraError, match="positive"):
        windows("abc", LetterTokenizer(), count=0, context=4)


def test_english_is_long_repeatable_and_plain():
    text = held_out_english()
    assert len(text) > 300_000
    assert text == held_out_english()
    assert held_out_english(1000) == text[:1000]
    assert ":ref:" not in text and "`" not in text and "\n\n\n" not in text
    assert text.count("the ") > 3000


def test_a_greedy_sample_repeats_and_leaves_out_the_prompt():
    model = tiny_llama().train()
    model.generation_config.eos_token_id = None
    text = sample(model, LetterTokenizer(), "abc", tokens=5)
    assert len(text.split()) == 5
    assert text == sample(model, LetterTokenizer(), "abc", tokens=5)
    assert model.training


def test_sampling_needs_a_language_model():
    with pytest.raises(LowraError, match="cannot generate"):
        sample(torch.nn.Linear(2, 2), LetterTokenizer(), "abc", tokens=5)
