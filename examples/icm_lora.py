"""ICM-LoRA: a small network that writes an adapter when it is told what the task is.

    python examples/icm_lora.py                  # a tiny model made here, a minute on a CPU
    python examples/icm_lora.py --model small/   # what `lowra compile` wrote, with its tokenizer

As in the paper (arXiv 2501.17635): adapters are trained for a few tasks, each from the same start,
and the last checkpoints of every run are kept. A conditional variational autoencoder of strided
convolutions learns the flattened factors, given the task vector: the mean hidden state of the
task's text. It then writes factors for a task vector alone, which an `AdapterPool` serves.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import lowra
from lowra.compiler.errors import LowraError
from lowra.runtime.module_view import quantized_linears

TASKS = ("abcabcabc", "xyzzyxyzz", "hello you", "one, two.", "(a)(b)(c)", "01234567.")
"""Each task is to go on with one of these, over and over."""

KL_WEIGHT = 0.005
"""Of the divergence from a normal latent, beside the mean squared error: as the paper's code."""

Factors = dict[str, tuple[Tensor, Tensor, float]]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, help="a folder that lowra compile wrote")
    parser.add_argument("--steps", type=int, default=60, help="of each adapter")
    parser.add_argument("--epochs", type=int, default=400, help="of the generator")
    arguments = parser.parse_args()
    try:
        model, encode = load(arguments.model)
        run(model, [encode(task) for task in TASKS], arguments.steps, arguments.epochs)
    except LowraError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def load(folder: Path | None) -> tuple[Any, Any]:
    """A compressed model and what turns a task into tokens [1, length]."""
    if folder is not None:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(folder)
        return lowra.load(folder), lambda text: tokenizer(text * 8, return_tensors="pt").input_ids
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    small = lowra.compile(model, bit_budget=4, rank=4, calibration_tokens=512, context=32)
    return small, lambda text: torch.tensor([[ord(letter) for letter in text * 4]])


def run(model: Any, tasks: Sequence[Tensor], steps: int, epochs: int) -> list[dict[str, float]]:
    """Losses of every task: of the base alone, with its trained and with its written adapter."""
    start = factors_of(model)
    conditions = torch.stack([task_vector(model, ids) for ids in tasks])
    samples = [trained(model, start, ids, steps) for ids in tasks]
    data = torch.stack([flat(factors) for run in samples for factors in run])
    generator = fit(data, conditions.repeat_interleave(len(samples[0]), 0), epochs)
    model.eval()
    pool = lowra.AdapterPool(model, budget_bytes=64 << 20)
    found = []
    for number, ids in enumerate(tasks):
        written = unflat(generator.write(conditions[number]), start)
        for name, factors in (("trained", samples[number][-1]), ("written", written)):
            pool.add(f"{name} {number}", factors, on_top=False)
        losses = {"base": served_loss(pool, None, ids)}
        for name in ("trained", "written"):
            losses[name] = served_loss(pool, f"{name} {number}", ids)
        found.append(losses)
        print(f"task {number}: " + ", ".join(f"{name} {loss:.3f}" for name, loss in losses.items()))
    return found


def factors_of(model: nn.Module) -> Factors:
    """The model's own A, B and scaling by layer, A as it is and B at zero: where runs start."""
    found: Factors = {}
    for name, layer in quantized_linears(model).items():
        if layer.lora_A is not None and layer.lora_B is not None:
            found[name] = (layer.lora_A.detach().clone(), 0 * layer.lora_B.detach(), layer.scaling)
    if not found:
        raise LowraError("the model has no adapter: compile it with a rank above 0")
    return found


@torch.no_grad()
def task_vector(model: Any, ids: Tensor) -> Tensor:
    """The mean of the last hidden states of a task's text [hidden]."""
    return model(ids, output_hidden_states=True).hidden_states[-1][0].float().mean(0)


def trained(model: Any, start: Factors, ids: Tensor, steps: int, kept: int = 5) -> list[Factors]:
    """The adapter after each of the last `kept` steps of a run."""
    own = copy.deepcopy(model).train()
    layers = quantized_linears(own)
    for name, (a, b, scaling) in start.items():
        layers[name].set_adapter(a, b, scaling)
    lowra.prepare_training(own)
    optimizer = torch.optim.AdamW([p for p in own.parameters() if p.requires_grad], lr=5e-3)
    checkpoints = []
    for step in range(steps):
        optimizer.zero_grad()
        own(ids, labels=ids).loss.backward()
        optimizer.step()
        if step >= steps - kept:
            checkpoints.append({
                name: (*(f.detach().clone() for f in _pair(layers[name])), layers[name].scaling)
                for name in start
            })  # fmt: skip
    return checkpoints


def _pair(layer: Any) -> tuple[Tensor, Tensor]:
    return layer.lora_A, layer.lora_B


def served_loss(pool: lowra.AdapterPool, name: str | None, ids: Tensor) -> float:
    with torch.no_grad(), pool.use(name):
        model: Any = pool.model
        if name is None:
            with model.lowra.adapters_disabled(model):
                return float(model(ids, labels=ids).loss)
        return float(model(ids, labels=ids).loss)


def flat(factors: Mapping[str, tuple[Tensor, Tensor, float]]) -> Tensor:
    """All A and B of an adapter as one vector."""
    return torch.cat([f.reshape(-1).float() for a, b, _ in factors.values() for f in (a, b)])


def unflat(vector: Tensor, like: Factors) -> Factors:
    """The inverse of `flat`, in the shapes of `like`."""
    found: Factors = {}
    at = 0
    for name, (a, b, scaling) in like.items():
        parts = []
        for shape in (a.shape, b.shape):
            parts.append(vector[at : at + shape.numel()].view(shape).clone())
            at += shape.numel()
        found[name] = (parts[0], parts[1], scaling)
    return found


class Generator(nn.Module):
    """A conditional VAE of vectors [length]: strided convolutions, the condition beside the latent.

    Vectors are normalised by `mean` and `scale` of the training set, conditions likewise.
    """

    def __init__(self, data: Tensor, conditions: Tensor, latent: int = 32, width: int = 8) -> None:
        super().__init__()
        self.length = data.shape[1]
        depth = max(1, (self.length // 64).bit_length())
        self.padded = -(-self.length // 2**depth) * 2**depth
        for name, values in (("data", data), ("condition", conditions)):
            self.register_buffer(f"{name}_mean", values.mean(0))
            self.register_buffer(f"{name}_scale", values.std(0).mean().clamp_min(1e-6))
        self.encoder = nn.Sequential()
        self.decoder = nn.Sequential()
        for layer in range(depth):
            first, last = layer == 0, layer == depth - 1
            into = nn.Conv1d(1 if first else width, width, 3, stride=2, padding=1)
            out = nn.ConvTranspose1d(width, 1 if last else width, 4, stride=2, padding=1)
            self.encoder.extend([into, nn.SiLU()])
            self.decoder.extend([out] if last else [out, nn.SiLU()])
        inner, told = width * (self.padded >> depth), conditions.shape[1]
        self.shape = (width, self.padded >> depth)
        self.to_latent = nn.Linear(inner + told, 2 * latent)
        self.from_latent = nn.Linear(latent + told, inner)
        self.latent = latent

    def forward(self, data: Tensor, conditions: Tensor) -> Tensor:
        """The loss of a batch: mean squared error and KL to the normal latent."""
        wanted = (data - self.get_buffer("data_mean")) / self.get_buffer("data_scale")
        told = self._told(conditions)
        given = nn.functional.pad(wanted, (0, self.padded - self.length))
        hidden = self.encoder(given[:, None]).flatten(1)
        mean, log_var = self.to_latent(torch.cat([hidden, told], 1)).chunk(2, 1)
        drawn = mean + torch.randn_like(mean) * (log_var / 2).exp()
        kl = (mean.square() + log_var.exp() - 1 - log_var).sum(1).mean() / 2
        return nn.functional.mse_loss(self._decoded(drawn, told), wanted) + KL_WEIGHT * kl

    @torch.no_grad()
    def write(self, condition: Tensor) -> Tensor:
        """The vector [length] for a condition, at the mean of the latent."""
        told = self._told(condition[None])
        made = self._decoded(torch.zeros(1, self.latent), told)[0]
        return made * self.get_buffer("data_scale") + self.get_buffer("data_mean")

    def _told(self, conditions: Tensor) -> Tensor:
        mean, scale = self.get_buffer("condition_mean"), self.get_buffer("condition_scale")
        return (conditions - mean) / scale

    def _decoded(self, latent: Tensor, told: Tensor) -> Tensor:
        hidden = self.from_latent(torch.cat([latent, told], 1)).view(-1, *self.shape)
        return self.decoder(hidden)[:, 0, : self.length]


def fit(data: Tensor, conditions: Tensor, epochs: int) -> Generator:
    """A generator trained on vectors [samples, length] and their conditions, full batches."""
    torch.manual_seed(0)
    generator = Generator(data, conditions)
    optimizer = torch.optim.AdamW(generator.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    for _ in range(epochs):
        optimizer.zero_grad()
        generator(data, conditions).backward()
        optimizer.step()
        schedule.step()
    return generator.eval()


if __name__ == "__main__":
    sys.exit(main())
