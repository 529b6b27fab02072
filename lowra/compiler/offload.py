"""A compile's heavy work on another device than the CPU, where its tensors lie.

Passes know one device, the CPU: their tensors, spill files and packed weights are there. What takes
nearly all of their time are products, factorisations and the `lowra::` fitting ops. Each of these
that is worth the way goes to the device, is computed there and comes back, with gradients too, as
all this lies below autograd.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from lowra.compiler.attention import attention, attention_gradients
from lowra.compiler.errors import RecipeError, is_no_room

log = logging.getLogger("lowra")
_ATEN = torch.ops.aten

_OPERANDS: Mapping[Any, int] = {
    _ATEN.mm.default: 0, _ATEN.bmm.default: 0, _ATEN.linear.default: 0, _ATEN.matmul.default: 0,
    _ATEN.addmm.default: 1, _ATEN.baddbmm.default: 1,
}  # fmt: skip
"""Products of matrices, and where their two operands begin."""
_FACTORISATIONS = frozenset({
    _ATEN.linalg_cholesky_ex.default, _ATEN.linalg_solve_triangular.default,
    _ATEN._linalg_eigh.default, _ATEN._linalg_svd.default, _ATEN.linalg_qr.default,
})  # fmt: skip
_FITTING = frozenset({
    "lowra::moments", "lowra::lloyd_rows", "lowra::lloyd_shared", "lowra::lloyd_scales",
    "lowra::optimal_levels", "lowra::feedback_codes", "lowra::descend_codes",
})  # fmt: skip
_ATTENTION: Mapping[Any, Callable[..., Any]] = {
    _ATEN._scaled_dot_product_flash_attention_for_cpu.default: attention,
    _ATEN._scaled_dot_product_flash_attention_for_cpu_backward.default: attention_gradients,
}
"""Ops that only CPUs have, and what stands for them."""

LEAST_PRODUCT = 1 << 26
"""Multiply-adds: a CPU takes about a millisecond for fewer."""
PER_ELEMENT = 128
"""Multiply-adds per element that has to travel: where a bus of 20 GB/s carries float32 as fast as a
CPU of 0.6 tera multiply-adds per second works. Neither was measured here."""
LEAST_ELEMENTS = 1 << 18
"""Of a matrix to factorise, or to fit codes to: 512 x 512."""


def work_device(name: str | torch.device | None) -> torch.device | None:
    """The device that `name` names, None for the CPU. Raises RecipeError where it cannot serve."""
    if name is None:
        return None
    try:
        device = torch.device(name)
    except RuntimeError:
        raise RecipeError(f"device={name!r} is unknown: use cpu, cuda or cuda:1") from None
    if device.type == "cpu":
        return None
    if device.type != "cuda":
        raise RecipeError(f"device={name!r}: a compile's heavy work runs on cpu or cuda")
    count = torch.cuda.device_count()
    if (device.index or 0) >= count:
        raise RecipeError(f"device={name!r}, and torch sees {count} GPUs: use device='cpu'")
    return device


class Offload(TorchDispatchMode):
    """Within it, heavy ops of tensors on the CPU are computed on `device`.

    `kept`: tensors that nothing writes into, such as a program's weights. They travel once and stay
    on the device, up to `room` bytes. What the device has no memory for is computed on the CPU.
    """

    def __init__(self, device: torch.device, kept: Sequence[Tensor], room: int) -> None:
        super().__init__()
        self.device, self.room = device, room
        self._kept = {_place(tensor): tensor for tensor in kept if _fills_storage(tensor)}
        self._moved: dict[int, Tensor] = {}
        self._full = False

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Sequence[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        compute = _ATTENTION.get(func, func)
        if not (_may_travel(func, args) and self._is_worth_it(func, args, kwargs)):
            return func(*args, **kwargs)
        try:
            with self._there():
                given = tree_map_only(Tensor, self._sent, (args, kwargs))
                found = compute(*given[0], **given[1])
                return tree_map_only(Tensor, lambda tensor: tensor.to("cpu"), found)
        except RuntimeError as error:
            if not is_no_room(error):
                raise
            self._say_full()
            return func(*args, **kwargs)

    @contextmanager
    def _there(self) -> Generator[None, None, None]:
        """On the device, float32 products being float32 whatever scripts have set."""
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        try:
            with torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext():
                yield
        finally:
            torch.set_float32_matmul_precision(before)

    def _is_worth_it(self, func: Any, args: Any, kwargs: Any) -> bool:
        tensors = _tensors(args, kwargs)
        if any(t.device.type != "cpu" for t in tensors):
            return False
        if not _is_product(func):
            return max(t.numel() for t in tensors) >= LEAST_ELEMENTS
        if not all(t.is_floating_point() for t in tensors):
            return False
        work = _multiply_adds(func, args)
        travels = sum(t.numel() for t in tensors if not self._stays(t))
        return work >= max(LEAST_PRODUCT, PER_ELEMENT * travels)

    def _stays(self, tensor: Tensor) -> bool:
        """Whether it is a kept tensor, or a part of one, that is there or has room there."""
        place = _place(tensor)
        kept = self._kept.get(place)
        if kept is None or kept.dtype != tensor.dtype:
            return False
        return place in self._moved or kept.nbytes <= self.room

    def _sent(self, tensor: Tensor) -> Tensor:
        if not self._stays(tensor):
            return tensor.to(self.device)
        place = _place(tensor)
        if place not in self._moved:
            whole = self._kept[place]
            self._moved[place] = whole.as_strided((whole.numel(),), (1,), 0).to(self.device)
            self.room -= whole.nbytes
        return self._moved[place].as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())

    def _say_full(self) -> None:
        if not self._full:
            log.warning("%s has no memory for a part of the work: the CPU does it", self.device)
        self._full = True


def offload(device: torch.device, kept: Sequence[Tensor]) -> Offload:
    """The mode for a GPU, of whose free memory half may be taken by what is kept there."""
    return Offload(device, kept, torch.cuda.mem_get_info(device)[0] // 2)


def _place(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _fills_storage(tensor: Tensor) -> bool:
    return tensor.untyped_storage().nbytes() == tensor.nbytes > 0


def _tensors(args: Any, kwargs: Any) -> list[Tensor]:
    found: list[Tensor] = []
    tree_map_only(Tensor, found.append, (args, kwargs))
    return found


def _may_travel(func: Any, args: Any) -> bool:
    if func.name() in _FITTING:
        return not _on_paths(func, args)
    return _is_product(func) or func in _FACTORISATIONS


def _on_paths(func: Any, args: Any) -> bool:
    """Whether an op on codes has runs of trellis codes, whose paths no GPU kernel finds."""
    names = [argument.name for argument in func._schema.arguments]
    given = dict(zip(names, args, strict=False))
    return given.get("runs") is not None


def _is_product(func: Any) -> bool:
    return func in _OPERANDS or func in _ATTENTION


def _multiply_adds(func: Any, args: Any) -> int:
    if _ATTENTION.get(func) is attention:
        query, key = args[0], args[1]
        return 2 * query.numel() * key.shape[-2]
    if func in _ATTENTION:
        _, query, key, *_ = args
        same = query.shape[-3] == key.shape[-3]
        return 5 * query.numel() * key.shape[-2] if same else 0
    a, b = args[_OPERANDS[func] : _OPERANDS[func] + 2]
    if b.dim() < 2:
        return a.numel()
    return a.numel() * b.shape[-2 if func is _ATEN.linear.default else -1]
