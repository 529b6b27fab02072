"""Calibration text that a model writes itself."""

import copy

import pytest
import torch
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, T5Config
from transformers import T5ForConditionalGeneration as T5

from lowra.compiler.errors import CalibrationError
from lowra.workflows.generated_calibration import generate_calibration

VOCAB = 101


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
