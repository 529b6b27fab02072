"""What of a compiled model trains, and the state that a Hugging Face Trainer keeps of it.

Trainer writes `model.save_pretrained(folder)` into its checkpoints and reads them back with
`load_state_dict(..., strict=False)`. A compiled model writes only what trains there, as PEFT's
models do, and beside it digests of the base, without which A and B mean nothing.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lowra.compiler.errors import CheckpointError, RecipeError, nearest
from lowra.runtime.compiled import ATTRIBUTE, Compiled, compiled
from lowra.runtime.manifest import checksum
from lowra.runtime.module_view import quantized_linears
from lowra.runtime.modules import QuantizedEmbedding, QuantizedLinear
from lowra.runtime.quantized_module import QuantizedModule, is_lora
from lowra.runtime.trained_norms import hold_norm
from lowra.runtime.trained_tables import TABLES, TrainedTables, is_offset

MARK = "lowra.base"
"""In a Trainer checkpoint: uint8 [3, 32], the sha256 of what `DIGESTS` names."""

DIGESTS = ("original model", "recipe", "compressed weights")
STATE = "model.safetensors"
NOTE = "lowra_training.json"
ADAPTERS = ("adapters",)
"""What trains unless a recipe or a training run says otherwise."""

PARTS = (*ADAPTERS, "norms", *TABLES)
"""What may train."""


@dataclass(frozen=True)
class Trainable:
    """How many parameters train: of each of `PARTS`, and out of how many of the model.

    A compressed weight [n, k] counts as n * k. `bytes` is what the trained ones take in memory.
    """

    adapters: int
    norms: int
    codebooks: int
    scales: int
    total: int
    bytes: int

    @property
    def trained(self) -> int:
        return self.adapters + self.norms + self.codebooks + self.scales

    def __str__(self) -> str:
        others = [f"{part} {getattr(self, part):,}" for part in PARTS[1:] if getattr(self, part)]
        beside = f" (of these {', '.join(others)})" if others else ""
        return (
            f"trainable params: {self.trained:,}{beside} || all params: {self.total:,} || "
            f"trainable%: {100 * self.trained / max(self.total, 1):.4f}"
        )


def trainable(model: nn.Module) -> Trainable:
    """The report of `print(trainable(model))`, as peft's `print_trainable_parameters` gives it."""
    named = dict(model.named_parameters())
    trained = {name: p for name, p in named.items() if p.requires_grad}
    count: dict[str, int] = dict.fromkeys(PARTS, 0)
    for name, parameter in trained.items():
        count[_part_of(name)] += parameter.numel()
    layers = [m for m in model.modules() if isinstance(m, QuantizedModule)]
    packed = {layer.codes.data_ptr(): layer.n * layer.k for layer in layers}
    dense = sum(p.numel() for name, p in named.items() if not is_offset(name))
    return Trainable(
        **count, total=dense + sum(packed.values()),
        bytes=sum(p.numel() * p.element_size() for p in trained.values()),
    )  # fmt: skip


def _part_of(name: str) -> str:
    """Which of `PARTS` a trained parameter is of; what else a user trains counts as norms."""
    if is_offset(name):
        return name.rpartition(".")[2]
    return "adapters" if is_lora(name) else "norms"


def prepare_training(
    model: nn.Module, train: Sequence[str] | None = None, dtype: torch.dtype = torch.float32
) -> Trainable:
    """Make these parts of a compiled model, out of `PARTS`, the only parameters that train; by
    default what its recipe says.

    They are held in `dtype`, float32 as peft does it: an optimiser's small steps are lost in
    bfloat16. Products run in the dtype of the activations all the same. "codebooks" and "scales"
    train as offsets from what they are now (`TrainedTables`); once they no longer train, or the
    model is saved, the tables are what training made of them. A correction stays frozen.

    Raises CheckpointError for a model that lowra did not compile, or that lacks what shall train;
    RecipeError for another part.
    """
    usual = parts_of(model)
    train = usual if train is None else train
    check_parts(train)
    layers = [m for m in model.modules() if isinstance(m, QuantizedLinear | QuantizedEmbedding)]
    if "adapters" in train and not any(layer.rank for layer in quantized_linears(model).values()):
        raise CheckpointError("this model has no adapter to train: compile it with a rank above 0")
    if "scales" in train and all(layer.scales is None for layer in layers):
        raise CheckpointError("this model has no scales to train: its codebooks carry them")
    _train_tables(layers, [part for part in train if part in TABLES], dtype)
    norms = _norms(model) if "norms" in train else {}
    for norm in norms.values():
        hold_norm(norm, dtype)
    trained = {id(p) for norm in norms.values() for p in norm.parameters(recurse=False)}
    for name, parameter in model.named_parameters():
        adapter = is_lora(name) and "adapters" in train
        parameter.requires_grad_(adapter or is_offset(name) or id(parameter) in trained)
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    return trainable(model)


def parts_of(model: nn.Module) -> tuple[str, ...]:
    """What the recipe of a compiled model trains. Raises CheckpointError for another model."""
    info = compiled(model)
    if info is None:
        raise CheckpointError("this model was not compiled by lowra; call lowra.compile first")
    return tuple(info.recipe.get("train", ADAPTERS))


def check_parts(train: Sequence[str]) -> None:
    """Raise RecipeError unless these are parts that may train."""
    for part in train:
        if part not in PARTS:
            raise RecipeError(f"train={part!r} is unknown; {nearest(str(part), PARTS)}")
    if not train:
        raise RecipeError(f"train=() trains nothing; name some of {', '.join(PARTS)}")


def _train_tables(layers: Sequence[QuantizedModule], roles: list[str], dtype: torch.dtype) -> None:
    """Let the tables of these roles train, from what they are now, and no other."""
    shared: dict[int, TrainedTables] = {}
    for layer in layers:
        start = layer.stored()
        layer.tables = None
        if roles:
            place = layer.codes.data_ptr()
            if place not in shared:
                shared[place] = TrainedTables(start, roles, dtype)
            layer.tables = shared[place]


def _norms(model: nn.Module) -> dict[str, nn.Module]:
    """Normalisation layers, which are told by their class's name."""
    return {n: m for n, m in model.named_modules() if "norm" in type(m).__name__.lower()}


def set_dropout(model: nn.Module, share: float) -> None:
    """Drop a share of every adapter's inputs in training mode."""
    for layer in quantized_linears(model).values():
        layer.dropout = float(share)


def attach(model: nn.Module, info: Compiled) -> None:
    """Make `model` carry `info`, and keep and take training state as described above."""
    setattr(model, ATTRIBUTE, info)
    set_dropout(model, info.recipe.get("lora_dropout", 0.0))
    model.register_load_state_dict_pre_hook(_check_state)
    model.register_load_state_dict_post_hook(_forget_base)
    if hasattr(model, "save_pretrained"):
        model.__dict__["save_pretrained"] = MethodType(save_trained, model)


def save_trained(
    model: nn.Module, folder: str | Path, is_main_process: bool = True, **_options: Any
) -> None:
    """Write what trains, by its name in the state dict, and what base it belongs to.

    `lowra.save` writes the whole model. The options of transformers' `save_pretrained` that Trainer
    gives are about whole models and are not needed here.
    """
    if not is_main_process:
        return
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    trained = {n: p.detach().contiguous() for n, p in model.named_parameters() if p.requires_grad}
    save_file({**trained, MARK: base_mark(model)}, path / STATE, metadata={"format": "pt"})
    note = {
        "what": "training state of a model compressed by lowra: what trains, without its base",
        "use": "resume with Trainer on the same compressed model; lowra.save writes whole models",
        "trained": sorted(trained),
        "recipe": dict(_info(model).recipe),
        "fingerprint": _info(model).fingerprint,
    }
    (path / NOTE).write_text(json.dumps(note, indent=2, sort_keys=True, default=str) + "\n")


def base_mark(model: nn.Module) -> Tensor:
    """uint8 [3, 32]: sha256 of the original model, of the recipe and of the compressed weights."""
    info = _info(model)
    weights = hashlib.sha256()
    for name, module in sorted(model.named_modules(), key=lambda named: named[0]):
        if isinstance(module, QuantizedModule):
            weight = module.stored() if module.tables is None else module.tables.start
            for role, tensor in sorted(weight.tensors().items()):
                weights.update(f"{name}.{role} {checksum(tensor)}".encode())
    recipe = json.dumps(dict(info.recipe), sort_keys=True, default=str).encode()
    digests = (
        hashlib.sha256(info.fingerprint.encode()).digest(), hashlib.sha256(recipe).digest(),
        weights.digest(),
    )  # fmt: skip
    return torch.tensor([list(digest) for digest in digests], dtype=torch.uint8)


def start_digest(model: nn.Module) -> str:
    """sha256 of what `base_mark` leaves out: adapters with their scaling and dropout, norms and
    whatever else is not compressed, trained or frozen."""
    total = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters(), key=lambda named: named[0]):
        total.update(f"{name} {checksum(parameter)}".encode())
    for name, module in sorted(model.named_modules(), key=lambda named: named[0]):
        if isinstance(module, QuantizedLinear):
            total.update(f"{name} {module.scaling!r} {module.dropout!r}".encode())
    return total.hexdigest()


def _info(model: nn.Module) -> Compiled:
    info = compiled(model)
    assert info is not None
    return info


def _check_state(
    model: nn.Module, state: dict[str, Tensor], prefix: str, _metadata: Any, _strict: bool,
    _missing: list[str], _unexpected: list[str], _errors: list[str],
) -> None:  # fmt: skip
    """Refuse training state of another base, or of other trained parameters."""
    mark = state.pop(prefix + MARK, None)
    model.__dict__["_lowra_partial"] = mark is not None
    if mark is None:
        return
    check_mark(model, mark)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    given = {name[len(prefix) :] for name in state if name.startswith(prefix)}
    if trained != given:
        odd = sorted(trained ^ given)[0]
        where = "the model and not in the checkpoint" if odd in trained else (
            "the checkpoint and not in the model"
        )  # fmt: skip
        raise CheckpointError(
            f"{odd} trains in {where}: resume with the same choice of what trains"
        )


def check_mark(model: nn.Module, mark: Tensor) -> None:
    """Raise CheckpointError unless training state with this mark belongs to `model`."""
    own = base_mark(model)
    if mark.shape != own.shape:
        raise CheckpointError(f"{MARK} of this checkpoint is damaged: it is {list(mark.shape)}")
    differs = [what for what, one, other in zip(DIGESTS, own, mark.cpu(), strict=True)
               if not torch.equal(one, other)]  # fmt: skip
    if differs:
        raise CheckpointError(
            f"this training state belongs to another base (other {', other '.join(differs)}): "
            "resume on the compressed model that it was trained on, or start anew"
        )


def _forget_base(model: nn.Module, incompatible: Any) -> None:
    """The base is not missing where a checkpoint holds what trains and no more."""
    if not model.__dict__.pop("_lowra_partial", False):
        return
    incompatible.missing_keys.clear()
