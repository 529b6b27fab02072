"""Codebooks and scales in training: gradients, what is saved, and how runs go on."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import lowra
from lowra.backends.cpu import linear, table_gradients
from lowra.compiler.compact import Compact
from lowra.compiler.errors import AdapterError, CheckpointError, RecipeError
from lowra.compiler.rotation import Rotation
from lowra.compiler.storage import PackedWeight, pack_weight, scale_groups
from lowra.runtime.modules import QuantizedLinear
from lowra.runtime.trained_tables import TrainedTables
from lowra.runtime.training import PARTS, prepare_training
from tests.runtime.compiled_models import (
    Case,
    compile_case,
    half_llama,
    low_llama,
    output,
    tied_llama_with_head,
)
from tests.runtime.test_trainer import BEST, compared, factors, trainer

ALL = PARTS
N, K = 20, 64
WIDTHS = (1, 2, 3, 4, 9)
LAYOUTS = [
    (-1, True, Compact()), (-1, True, Compact(8)), (-1, True, Compact(4)), (16, True, Compact(8)),
    (24, False, Compact(4, 8)), (0, False, Compact(16, 8)), (-1, False, Compact(8, 8)),
]  # fmt: skip


def student(case: Case | None = None, train: tuple[str, ...] = ALL) -> Any:
    model = copy.deepcopy((case or low_llama()).compiled).train()
    prepare_training(model, train)
    return model


def loss_of(model: Any, case: Case | None = None) -> Tensor:
    inputs = (case or low_llama()).inputs
    return model(**inputs, labels=inputs["input_ids"]).loss


def smooth() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 32),
        nn.LayerNorm(32),
    ).eval()  # fmt: skip


def weight(group: int, shared: bool, compact: Compact) -> PackedWeight:
    generator = torch.Generator().manual_seed(0)
    widths = torch.tensor(WIDTHS, dtype=torch.uint8)[torch.arange(N) % len(WIDTHS)]
    levels = {1: 2, 2: 4, 3: 8, 4: 16, 9: 3}
    limit = torch.tensor([levels[int(id)] for id in widths]).unsqueeze(1)
    codes = (torch.rand(N, K, generator=generator) * limit).long()
    books: Any = torch.randn(N, 16, generator=generator).sort(1).values
    if shared:
        sizes = {1: 2, 2: 4, 3: 8, 4: 16, 1.6: 3}
        books = {b: torch.randn(s, generator=generator).sort().values for b, s in sizes.items()}
    scales = 0.5 + torch.rand(N, scale_groups(K, group), generator=generator) if group else None
    return pack_weight(codes, widths, books, scales, group, Rotation(3, 64), compact)


def moved_layer(packed: PackedWeight) -> QuantizedLinear:
    """A layer whose tables have been trained for a while."""
    layer = QuantizedLinear(packed, None, torch.float32)
    layer.tables = TrainedTables(packed, ("codebooks", "scales"), torch.float32)
    generator = torch.Generator().manual_seed(1)
    for offsets in layer.tables.parameters():
        offsets.data += 0.3 * torch.randn(offsets.shape, generator=generator)
    return layer


@pytest.mark.parametrize(("group", "shared", "compact"), LAYOUTS)
def test_what_is_stored_is_what_was_computed_with(
    group: int, shared: bool, compact: Compact
) -> None:
    packed = weight(group, shared, compact)
    layer, x = moved_layer(packed), torch.randn(5, K, generator=torch.Generator().manual_seed(2))
    trained = layer(x)
    assert trained.requires_grad and not torch.equal(trained, packed.dequantize() @ x.T)
    stored = layer.stored()
    assert stored.stored_bits() == packed.stored_bits()
    assert not torch.equal(stored.codebooks, packed.codebooks)
    assert torch.equal(QuantizedLinear(stored, None, torch.float32)(x), trained)
    with torch.no_grad():
        assert torch.equal(layer(x), trained)


@pytest.mark.parametrize(("group", "shared", "compact"), LAYOUTS)
def test_untouched_tables_are_those_of_the_file(group: int, shared: bool, compact: Compact) -> None:
    packed = weight(group, shared, compact)
    layer = QuantizedLinear(packed, None, torch.float32)
    layer.tables = TrainedTables(packed, ("codebooks", "scales"), torch.float32)
    kept, given = layer.stored().tensors(), packed.tensors()
    assert all(torch.equal(kept[role], tensor) for role, tensor in given.items())


def test_gradients_are_the_slopes_of_the_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    """Through a whole model in float64, on tables that are not rounded, which have slopes."""

    def exact(tables: TrainedTables) -> Any:
        codebooks, scales = (None if t is None else t.detach() for t in tables.moved())
        moved = copy.copy(tables.start)
        for name, table in (("codebooks", codebooks), ("scales", scales)):
            object.__setattr__(moved, name, table)
        return moved

    monkeypatch.setattr(TrainedTables, "rounded", exact)
    case = compile_case(smooth, bit_budget=5, rank=4)
    model, generator = student(case).double(), torch.Generator().manual_seed(3)
    inputs = [torch.randn(6, 64, generator=generator).double()]

    def loss() -> Tensor:
        return model(*inputs).square().mul(torch.linspace(-1, 1, 32).double()).sum()

    for offsets in (p for name, p in factors(model).items() if ".tables." in name):
        offsets.data += 0.1 * torch.randn(offsets.shape, generator=generator)
    loss().backward()
    parts = {name.rpartition(".")[2] for name in factors(model)}
    assert parts == {"lora_A", "lora_B", "codebooks", "scales", "weight", "bias"}
    for name, parameter in factors(model).items():
        grad = parameter.grad
        assert grad is not None
        direction = torch.randn(parameter.shape, generator=generator).to(parameter)
        values = []
        for step in (1e-6, -1e-6):
            with torch.no_grad():
                parameter += step * direction
                values.append(float(loss()))
                parameter -= step * direction
        slope = (values[0] - values[1]) / 2e-6
        assert float((grad * direction).sum()) == pytest.approx(slope, rel=1e-4, abs=1e-6), name


def test_kernels_train_as_the_reference_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """Step by step; without kernels the plain-torch meaning of every op serves."""

    def run(model: Any) -> list[float]:
        optimizer = torch.optim.AdamW(factors(model).values(), lr=1e-2)
        seen = []
        for _ in range(6):
            optimizer.zero_grad()
            loss = loss_of(model)
            loss.backward()
            optimizer.step()
            seen.append(loss.item())
        return seen

    with_kernels = run(student())
    for module in (linear, table_gradients):
        monkeypatch.setattr(module, "prepared", lambda *_: None)
    assert run(student()) == pytest.approx(with_kernels, rel=1e-4)
    assert with_kernels[-1] < with_kernels[0]


def test_a_saved_model_is_the_one_that_was_trained(tmp_path: Path) -> None:
    model = student()
    trainer(model, tmp_path / "run").train()
    loaded = lowra.load(lowra.save(model.eval(), tmp_path / "saved"))
    assert not [name for name, _ in loaded.named_parameters() if ".tables." in name]
    inputs = low_llama().inputs
    assert torch.equal(output(loaded, inputs), output(model, inputs))
    assert not torch.equal(output(loaded, inputs), output(low_llama().compiled, inputs))
    prepare_training(model)  # tables no longer train, and stay as they were trained
    assert torch.equal(output(model.eval(), inputs), output(loaded, inputs))
    assert "tables" not in " ".join(model.state_dict())


def test_an_interrupted_run_that_resumes_equals_one_that_was_not(tmp_path: Path) -> None:
    whole, fresh = student(), student()
    trainer(whole, tmp_path / "run").train()
    again = trainer(fresh, tmp_path / "run")
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    for name, factor in factors(whole).items():
        assert torch.equal(factor, factors(fresh)[name]), name
    inputs = low_llama().inputs
    assert torch.equal(output(whole, inputs), output(fresh, inputs))


def test_the_best_tables_come_back_at_the_end(tmp_path: Path) -> None:
    model = student()
    trainer(model, tmp_path, **BEST).train()
    best = load_file(tmp_path / "checkpoint-2" / "model.safetensors")
    tables = [name for name in best if ".tables." in name]
    assert tables and all(torch.equal(best[name], factors(model)[name]) for name in tables)
    layer = next(m for m in model.modules() if isinstance(m, QuantizedLinear))
    assert layer.tables is not None
    assert torch.equal(layer.stored().codebooks, layer.tables.rounded().codebooks)


@pytest.mark.parametrize(
    "options",
    [
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
        {"gradient_checkpointing": True},
        {"bf16": True},
        {"torch_compile": True, "torch_compile_backend": "aot_eager"},
    ],
    ids=["not-reentrant", "checkpointing", "bf16", "compiled"],
)  # fmt: skip
def test_options_of_the_trainer_change_the_loss_by_rounding_alone(
    options: dict[str, Any], tmp_path: Path
) -> None:
    run, plain = compared(student, options, tmp_path)
    assert run == pytest.approx(plain, abs=0.02)


def test_an_adapter_belongs_to_the_tables_that_it_trained_beside(tmp_path: Path) -> None:
    model = student()
    trainer(model, tmp_path / "run", save_strategy="no").train()
    lowra.save_adapter(model, tmp_path / "adapter")
    with pytest.raises(AdapterError, match="another compile of this model"):
        lowra.load_adapter(copy.deepcopy(low_llama().compiled), tmp_path / "adapter")
    lowra.load_adapter(lowra.load(lowra.save(model, tmp_path / "saved")), tmp_path / "adapter")


def test_a_tied_head_and_its_embedding_train_one_table() -> None:
    case = tied_llama_with_head()
    model = student(case, ("codebooks",))
    tables = [m for m in model.modules() if isinstance(m, TrainedTables)]
    sites = cast("Any", case.compiled).lowra.sites
    assert len(tables) == len(sites)
    assert model.lm_head.tables is model.model.embed_tokens.tables
    loss_of(model, case).backward()
    both = model.lm_head.tables.codebooks.grad.clone()
    for name in ("lm_head", "model.embed_tokens"):
        alone = copy.deepcopy(model)
        alone.zero_grad()
        other = alone.get_submodule(name)
        packed = other.tables
        other.tables = None
        loss_of(alone, case).backward()
        both -= packed.codebooks.grad if packed.codebooks.grad is not None else 0
        rest = "model.embed_tokens" if name == "lm_head" else "lm_head"
        assert alone.get_submodule(rest).tables.codebooks.grad.any()
    assert float(both.abs().max()) < 1e-5


def test_a_correction_stays_frozen() -> None:
    case = compile_case(smooth, bit_budget=6, rank=4, correction_rank=2)
    model = student(case)
    frozen = {n: t.clone() for n, t in model.state_dict().items() if "correction" in n}
    assert frozen and not [n for n in factors(model) if "correction" in n]
    optimizer = torch.optim.AdamW(factors(model).values(), lr=1e-2)
    model(*case.inputs.values()).square().sum().backward()
    optimizer.step()
    assert all(p.grad is not None for p in factors(model).values())
    assert all(torch.equal(model.state_dict()[n], t) for n, t in frozen.items())


def test_norms_of_a_half_precision_model_train_in_float32_and_are_saved_in_halves(
    tmp_path: Path,
) -> None:
    model = student(half_llama())
    assert model.model.norm.weight.dtype == torch.float32
    optimizer = torch.optim.AdamW(factors(model).values(), lr=1e-2)
    first = loss_of(model, half_llama())
    first.backward()
    optimizer.step()
    assert loss_of(model, half_llama()) < first
    assert output(model, half_llama().inputs).dtype == torch.bfloat16
    loaded: Any = lowra.load(lowra.save(model.eval(), tmp_path / "saved"))
    assert loaded.model.norm.weight.dtype == torch.bfloat16
    torch.testing.assert_close(
        output(loaded, half_llama().inputs),
        output(model, half_llama().inputs),
        rtol=0.05,
        atol=0.05,
    )


def test_counts_and_refusals() -> None:
    model = copy.deepcopy(low_llama().compiled)
    report = prepare_training(model, ALL)
    layers = [m for m in model.modules() if isinstance(m, QuantizedLinear)]
    assert report.codebooks == sum(layer.codebooks.numel() for layer in layers)
    assert report.scales == sum(cast(Tensor, layer.scales).numel() for layer in layers)
    assert f"(of these norms {report.norms:,}, codebooks {report.codebooks:,}" in str(report)
    with pytest.raises(RecipeError, match="nearest: codebooks"):
        prepare_training(model, ("codebook",))
    with pytest.raises(RecipeError, match="trains nothing"):
        prepare_training(model, ())
    bare = lowra.compile(nn.Sequential(nn.Linear(64, 64)), bit_budget=6, group=0, rank=0,
                         shared_codebooks=False, scale_bits=16, example=(torch.randn(4, 64),),
                         widths=(2,))  # fmt: skip
    with pytest.raises(CheckpointError, match="no scales to train"):
        prepare_training(bare, ("scales",))
    with pytest.raises(CheckpointError, match="no adapter to train"):
        prepare_training(bare)
    assert prepare_training(bare, ("codebooks",)).trained > 0
