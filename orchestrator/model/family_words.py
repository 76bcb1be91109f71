"""Words of a family's table that mean nothing: names of fields, transforms, rules and sizes that do not exist."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator

from pydantic import ValidationError

from orchestrator.model.config import ModelConfig, MoeConfig
from orchestrator.model.config_experts import EXPERT_LAYERS
from orchestrator.model.config_hugging_face import QK_NORMS, TRANSFORMS
from orchestrator.model.config_keys import REQUIRED
from orchestrator.model.config_windows import WINDOW_RULES
from orchestrator.model.rules import ConfigTable, Family

_ANY_EXPERTS = MoeConfig(num_experts=1, top_k=1)
_ANY = ModelConfig(
    architecture="any", dtype="float32", vocab_size=1, hidden_size=1, num_hidden_layers=1, num_attention_heads=1,
    num_key_value_heads=1, head_size=1, intermediate_size=1, hidden_act="silu", norm_epsilon=1e-6, max_position_embeddings=1,
    rotary_base=1.0, moe=_ANY_EXPERTS,
)  # fmt: skip


def wrong_words(family: Family) -> Iterator[str]:
    """Yield each word of the table that is not known, with the place where it stands and where the known ones are listed."""
    yield from _of_config(family.config)
    for rule in family.rules:
        yield from (f"{problem} (rule of {rule.target})" for problem in _conditions(rule.when))
        sizes = {name for part in rule.parts for name in (*part.shape, *part.sections)}
        for name in sorted(sizes - _ANY.dims().keys()):
            yield f"shape: {name!r} is no size: {_or(_ANY.dims())} (rule of {rule.target})"
    for entry in family.ignored:
        yield from (f"{problem} (Ignored entry of {entry.pattern})" for problem in _conditions(entry.when))


def _of_config(table: ConfigTable) -> Iterator[str]:
    yield from _constants(table)
    yield from _derived(table)
    for key, where in ((table.activation, "activation"), (table.epsilon, "epsilon")):
        if key not in table.defaults:
            yield f"{where}: the key {key!r} is not in defaults"
    if table.windows not in WINDOW_RULES:
        yield f"windows: {table.windows!r} is no rule: {_or(WINDOW_RULES)}"
    if table.experts is not None and table.experts.layers not in EXPERT_LAYERS:
        yield f"experts.layers: {table.experts.layers!r} is no rule: {_or(EXPERT_LAYERS)}"


def _constants(table: ConfigTable) -> Iterator[str]:
    for name in sorted(table.constants.keys() - ModelConfig.model_fields.keys()):
        yield f"constants: {name!r} is no field of ModelConfig"
    for name in sorted((table.experts.constants if table.experts else {}).keys() - MoeConfig.model_fields.keys()):
        yield f"experts.constants: {name!r} is no field of MoeConfig"
    try:
        ModelConfig.model_validate({**_ANY.model_dump(), **table.constants})
    except ValidationError as error:
        yield from (f"constants: {'.'.join(map(str, each['loc']))} is {each['input']!r}. {each['msg']}" for each in error.errors())


def _derived(table: ConfigTable) -> Iterator[str]:
    transforms = {**TRANSFORMS, **QK_NORMS}
    for field, (transform, key) in table.derived.items():
        if field not in ModelConfig.model_fields:
            yield f"derived: {field!r} is no field of ModelConfig"
        if transform not in transforms:
            yield f"derived: {transform!r} of {field} is no transform: {_or(transforms)}"
        if key not in (*table.defaults, *REQUIRED):
            yield f"derived: {field} reads the key {key!r}, which defaults does not have"


def _conditions(names: Iterable[str]) -> Iterator[str]:
    for name in names:
        known: object = _ANY_EXPERTS if name.startswith("moe.") else _ANY
        if not hasattr(known, name.removeprefix("moe.")):
            yield f"when: {name!r} is no field of ModelConfig"


def _or(known: Collection[str]) -> str:
    *most, last = known
    return f"{', '.join(most)} or {last}"
