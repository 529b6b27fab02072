"""Whether an adapter belongs to the model of a pool, told by its header."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from lowra.compiler.errors import AdapterError, nearest
from lowra.runtime.adapter_config import WITH_PEFT
from lowra.runtime.adapter_files import Base
from lowra.runtime.adapter_view import base_of, factors_of
from lowra.runtime.compiled import Compiled
from lowra.runtime.serving.sources import Facts


def require_fit(
    name: str, facts: Facts, shapes: Mapping[str, tuple[int, int]], model: nn.Module
) -> None:
    """Raise AdapterError unless the model has a compressed linear for all that the adapter changes.

    shapes: (n, k) of the model's linears by module name.
    """
    if not facts.shapes:
        raise AdapterError(f"adapter {name!r} changes no linear at all: save it again")
    for module, (n, k) in facts.shapes.items():
        here = shapes.get(module)
        if here is None and module in dict(model.named_modules()):
            raise AdapterError(
                f"adapter {name!r} adapts {module}, which is not compressed here: {WITH_PEFT}"
            )
        if here is None:
            close = nearest(module, shapes)
            raise AdapterError(f"adapter {name!r} adapts {module}, which is not here; {close}")
        if (n, k or here[1]) != here:
            raise AdapterError(
                f"adapter {name!r} is for {module} [{n}, {k}], here it is {list(here)}: it is "
                "another model's"
            )


class Bases:
    """The fingerprints of a model, without and with its own adapter: made when they are asked for,
    and anew once that adapter is another one, or was trained on."""

    def __init__(self, model: nn.Module, info: Compiled) -> None:
        self._model, self._info = model, info
        self._own: list[Tensor] = []
        self._seen: list[object] = [None]
        self._found: tuple[Base, ...] = ()

    def now(self) -> tuple[Base, ...]:
        factors = factors_of(self._model).values()
        own = [tensor for a, b, _ in factors for tensor in (a, b)]
        seen: list[object] = [scaling for _, _, scaling in factors]
        seen += [(id(t), 0 if t.is_inference() else t._version) for t in own]
        if seen != self._seen:
            both = (base_of(self._model, self._info, with_adapter=x) for x in (False, True))
            # The tensors are kept, so that no other takes their id.
            self._own, self._seen, self._found = own, seen, tuple(both)
        return self._found


def stands_on_top(
    name: str, facts: Facts, bases: Bases, wanted: bool | None, check_base: bool
) -> bool:
    """Whether an adapter adds to the model's own one.

    Raises AdapterError for an adapter that was made for another base.
    """
    made_for = facts.base
    if made_for is None or not check_base:
        return True if wanted is None else wanted
    bare, whole = bases.now()
    if made_for.model != whole.model:
        raise AdapterError(
            f"adapter {name!r} was made for another model (fingerprint {made_for.model[:12]}, this "
            f"one was compiled from {whole.model[:12]}): serve it on its own base, or pass "
            "check_base=False if you know that the two fit"
        )
    fits = {above: made_for.packed == base.packed for above, base in ((True, whole), (False, bare))}
    if not any(fits.values()) or (wanted is not None and not fits[wanted]):
        place = {None: "", True: " with its own adapter", False: " without its own adapter"}[wanted]
        here = (whole if wanted else bare).packed
        raise AdapterError(
            f"adapter {name!r} was made for another compile of this model (fingerprint "
            f"{made_for.packed[:12]}, this one{place} is {here[:12]}), and stands"
            " for what that one lost: serve it there, or pass check_base=False"
        )
    return fits[True] if wanted is None else wanted
