"""adapter_config.json, PEFT's description of a LoRA adapter: written, read and judged.

PEFT's rules for patterns are kept (peft.utils.get_pattern_key, check_target_module_exists).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from lowra.compiler.errors import AdapterError

MERGE_FIRST = "merge it into the original model with peft, and compile the result"
WITH_PEFT = "load it with peft.PeftModel.from_pretrained(model, adapter), which works on this model"

NOT_LORA = {
    "use_dora": f"DoRA rescales the base's rows, which A and B cannot: {WITH_PEFT}",
    "modules_to_save": f"it replaces whole layers of the original, too: {MERGE_FIRST}",
    "trainable_token_indices": f"it changes rows of the embedding, too: {MERGE_FIRST}",
    "lora_bias": f"B has a bias of its own: {WITH_PEFT}",
    "target_parameters": f"it adapts bare parameters, such as stacked experts: {WITH_PEFT}",
    "layer_replication": f"it repeats layers of the original: {MERGE_FIRST}",
    "alora_invocation_tokens": f"it starts in the middle of a text (aLoRA): {WITH_PEFT}",
    "use_qalora": "QALoRA pools the inputs by group, and only GPTQ layers do: train plain LoRA",
    "use_bdlora": f"its factors are block-diagonal: {WITH_PEFT}",
    "arrow_config": f"it routes between adapters by token: {WITH_PEFT}",
    "monteclora_config": f"it samples its factors: {WITH_PEFT}",
    "kasa_config": f"it cuts the base's singular values off: {MERGE_FIRST}",
    "megatron_config": "it is for Megatron's parallel layers: convert it to plain LoRA first",
}  # fmt: skip
"""Fields of a LoraConfig that make an adapter more than y = W x + s B A x, and the way out."""

TAKEN_OUT = ("pissa", "olora", "corda", "lora_ga", "loftq")
"""Values of `init_lora_weights` that change the base, which an adapter then belongs to."""

TASKS = (("ForCausalLM", "CAUSAL_LM"), ("LMHeadModel", "CAUSAL_LM"))


def make_config(
    sizes: Mapping[str, tuple[int, float]], modules: Iterable[str], model_class: str,
    base_model: str | None = None, dropout: float = 0.0,
) -> dict[str, Any]:  # fmt: skip
    """A LoraConfig for adapters of (rank, scaling) by module name.

    `r` is the largest rank, `lora_alpha` belongs to it; what differs is in the patterns. `modules`
    are the names of all modules of the model: patterns that would match others are written exactly.
    """
    rank, scaling = max(sizes.values())
    alphas = {name: exact_alpha(s, r) for name, (r, s) in sizes.items()}
    alpha = exact_alpha(scaling, rank)
    ranks = {name: r for name, (r, _) in sizes.items() if r != rank}
    return {
        "peft_type": "LORA",
        "task_type": next((t for end, t in TASKS if model_class.endswith(end)), None),
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": _exact_keys(ranks, sizes, rank),
        "alpha_pattern": _exact_keys({n: a for n, a in alphas.items() if a != alpha}, sizes, alpha),
        "lora_dropout": dropout,
        "target_modules": _exact_targets(sorted(sizes), modules),
        "bias": "none",
        "use_rslora": False,
    }


def exact_alpha(scaling: float, rank: int) -> float:
    """lora_alpha such that lora_alpha / rank is `scaling`, to the last bit.

    Every quotient by `rank` has one; for other values it can be a unit in the last place away.
    """
    near = scaling * rank
    around = (round(near, 9), near, math.nextafter(near, math.inf), math.nextafter(near, -math.inf))
    alpha = next((a for a in around if a / rank == scaling), near)
    return int(alpha) if alpha.is_integer() else alpha


def _exact_keys(wanted: dict[str, Any], names: Iterable[str], otherwise: float) -> dict[str, Any]:
    """`wanted` by name, or by anchored pattern where a plain name would match another name too."""
    plain = all(_matched(wanted, n, otherwise) == wanted.get(n, otherwise) for n in names)
    return wanted if plain else {f"^{re.escape(name)}": value for name, value in wanted.items()}


def _exact_targets(names: list[str], modules: Iterable[str]) -> list[str] | str:
    targets = {"target_modules": names}
    if {m for m in modules if is_target(targets, m)} <= set(names):
        return names
    return "|".join(re.escape(name) for name in names)


def _matched(patterns: Mapping[str, Any], name: str, otherwise: Any) -> Any:
    """The value of the first pattern that matches the name or a dotted end of it."""
    for pattern, value in patterns.items():
        if _search(r"(.*\.)?({})$", pattern, name):
            return value
    return otherwise


def _search(frame: str, pattern: str, name: str) -> bool:
    try:
        return re.match(frame.replace("{}", pattern), name) is not None
    except re.error as error:
        raise AdapterError(
            f"the adapter's pattern {pattern!r} is no regular expression ({error}): repair "
            "adapter_config.json"
        ) from error


def is_target(config: Mapping[str, Any], name: str) -> bool:
    """Whether PEFT would adapt the module `name`, as far as `target_modules` says."""
    targets = config.get("target_modules") or ()
    if isinstance(targets, str):
        return _search(r"(?:{})\Z", targets, name)
    return any(name == target or name.endswith(f".{target}") for target in targets)


def names_all_targets(config: Mapping[str, Any]) -> bool:
    """Whether `target_modules` alone decides what is adapted."""
    limits = ("exclude_modules", "layers_to_transform", "layers_pattern")
    return bool(config.get("target_modules")) and not any(config.get(key) for key in limits)


def rank_of(config: Mapping[str, Any], name: str) -> int:
    """The rank that the config gives to a module. Raises AdapterError."""
    rank = _matched(_pattern(config, "rank_pattern"), name, config.get("r", 8))
    if type(rank) is not int or rank < 1:
        raise AdapterError(f"the adapter's rank for {name} is {rank!r}: repair adapter_config.json")
    return rank


def scaling_of(config: Mapping[str, Any], name: str, rank: int) -> float:
    """alpha / rank, or alpha / sqrt(rank) with rsLoRA (arXiv 2312.03732). Raises AdapterError."""
    alpha = _matched(_pattern(config, "alpha_pattern"), name, config.get("lora_alpha", 8))
    if type(alpha) not in (int, float) or not math.isfinite(alpha):
        raise AdapterError(f"lora_alpha for {name} is {alpha!r}: repair adapter_config.json")
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _pattern(config: Mapping[str, Any], field: str) -> Mapping[str, Any]:
    patterns = config.get(field) or {}
    if not isinstance(patterns, Mapping):
        raise AdapterError(f"{field} is {patterns!r}, no object: repair adapter_config.json")
    return patterns


def require_lora(
    config: Mapping[str, Any], source: str, check_base: bool = True, allowed: tuple[str, ...] = ()
) -> None:
    """Raise AdapterError for what is no LoRA, more than LoRA, or LoRA on a base that was changed.

    `allowed` are fields of NOT_LORA that the caller can make sense of.
    `bias` needs no word here: a bias that was trained is in the tensors, and refused there.
    """
    kind = config.get("peft_type")
    if kind != "LORA":
        raise AdapterError(
            f"{source} is of type {kind!r}, not LORA: convert it with peft.convert_to_lora, or "
            "load it with peft"
        )
    for field, reason in NOT_LORA.items():
        if config.get(field) and field not in allowed:
            raise AdapterError(f"{source} sets {field}={config[field]!r}: {reason}")
    start = config.get("init_lora_weights")
    if check_base and isinstance(start, str) and start.lower().startswith(TAKEN_OUT):
        raise AdapterError(
            f"{source} was started with init_lora_weights={start!r}, which changes the base, and "
            "belongs to that base: save it with path_initial_model_for_weight_conversion=, or pass "
            "check_base=False if this model was compiled from the changed base"
        )
