"""Check a model against the table of a family: keys of config.json, tensors, and what a small model of it computes.

All problems are found in one run, where a build stops at the first. So this is the tool for adding a family.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from orchestrator.base.errors import MESSAGE_BYTES, ArchitectureError, OrchestratorError, WeightMapError, bounded
from orchestrator.base.extras import require
from orchestrator.checkpoints import read_source
from orchestrator.checkpoints.huggingface import parse_json
from orchestrator.families import family_named, find
from orchestrator.families.nearest import Nearness, kind_of, nearest, unsupported
from orchestrator.families.wrappers import architecture_of, is_wrapper, language_config, refusal
from orchestrator.model.checkpoint import CheckpointIndex
from orchestrator.model.config import ModelConfig
from orchestrator.model.config_hugging_face import from_hugging_face
from orchestrator.model.config_keys import REQUIRED, ROTARY_KEYS, key_problems, switches_on, unknown_keys
from orchestrator.model.family_words import wrong_words
from orchestrator.model.rules import Family
from orchestrator.model.stage import StageOptions
from orchestrator.model.topology import Topology
from orchestrator.model.weight_map import Accounting, accounting
from orchestrator.model.weight_names import disagreements
from orchestrator.planning.facts import Miniature
from orchestrator.planning.options import MiniatureOptions

_NEAREST = 3
_KEYS = "In a table that you write: add what the model's code reads to `defaults`, the rest to `passed_over`."
_TARGETS = (
    "Give each rule the target that the graph reads (orchestrator/model/weight_names.py), or set what decides it in the table's "
    "`constants` or `derived`: norm_placement, exact_norms, qk_layernorm, attn_bias and other fields of ModelConfig."
)
_DEFAULTS = (
    "Correct `defaults`, `windows` or `rotary` of the family's table: they say what is read where config.json has no such key."
)
_DIFFERS = (
    "Correct what the family's table says of config.json, or the graph of that part (orchestrator/networks); docs/add-a-family.md "
    "walks through one."
)


@dataclass
class FamilyCheck:
    """Result of a check."""

    architecture: str
    part_of: str = ""
    """Architecture of the larger model that the language model is part of; empty: none."""
    family: str | None = None
    nearest: list[Nearness] = field(default_factory=list)
    """The nearest families, where none knows the architecture."""
    accounting: Accounting | None = None
    """None: the tensors could not be accounted for."""
    is_of_miniature: bool = False
    """Whether the tensors are those of a small model of transformers, because there is no checkpoint but a config.json."""
    miniature: Miniature | None = None
    """None: it differs, or was not computed."""
    defaults: str = ""
    """Whether keys that config.json leaves out are read as transformers reads them, or why that was not compared; empty: they are
    not, or there are other problems."""
    is_computed: bool = False
    """Whether the small model was computed. It is not where the table, or its tensors, do not add up."""
    problems: list[OrchestratorError] = field(default_factory=list)

    def facts(self) -> dict[str, Any]:
        """Return the result for machines."""
        found = self.accounting
        return {
            "architecture": self.architecture,
            "part_of": self.part_of,
            "family": self.family,
            "nearest": {each.family: each.line() for each in self.nearest},
            "tensors": {
                "read": len(found.read), "ignored": dict(found.ignored), "missing": list(found.missing),
                "misshapen": list(found.misshapen), "unread": list(found.unread),
            } if found else None,
            "defaults": self.defaults,
            "miniature": self.miniature.model_dump(mode="json") if self.miniature else None,
            "problems": [{"error": type(each).__name__, "message": each.message, "advice": each.advice} for each in self.problems],
        }  # fmt: skip


def check_family(source: str, family_name: str = "auto", ignored_keys: Iterable[str] = ()) -> FamilyCheck:
    """Check the checkpoint at `source`, or the config.json that `source` names, against a family's table.

    Raises the source's errors, and ArchitectureError for a family that does not exist. All else is in the result's `problems`.
    """
    require("build")
    index = _index(source)
    ignored = frozenset(ignored_keys)
    found = FamilyCheck(str((index.config.get("architectures") or ["none"])[0]), index.part_of)
    family: Family | None
    if family_name != "auto":
        family, ignored = family_named(family_name), ignored | {"model_type"}
    else:
        family = _known(index, source, found)
    if family is None:
        return found
    found.family = family.name
    architecture = found.architecture if found.architecture in family.architectures else family.architectures[0]
    found.problems += [
        ArchitectureError(f"the table of {family.name} has a word that means nothing. {word}", "Correct it in the family's table.")
        for word in wrong_words(family)
    ]
    if found.problems:
        return found
    found.problems += [
        type(each)(each.message, f"{each.advice} {_KEYS}")
        for each in key_problems(index.config, architecture, family.config, ignored)
    ]
    # What is reported once is passed over afterwards, so that the rest is checked all the same.
    passed_over = {*ignored, *unknown_keys(index.config, family.config), *switches_on(index.config, family.config), "model_type"}
    options = MiniatureOptions(
        config=dict(index.config), family=family.name, architecture=architecture, ignored_keys=tuple(sorted(passed_over))
    )
    if not index.part_of:
        found.problems += _default_problems(index.config, family)
    if _account(index, family, options, found):
        _compute(options, found)
    if found.miniature is not None and not found.problems and not index.part_of:
        _compute_defaults(options, family, found)
    return found


def _index(source: str) -> CheckpointIndex:
    """Return the index of a checkpoint, or one without tensors of a config.json."""
    path = Path(source)
    if path.suffix != ".json" or not path.is_file():
        return read_source(source)[0]
    config = parse_json(path.read_bytes(), source)
    index = CheckpointIndex("config.json", (), {}, {key: value for key, value in config.items() if key != "quantization_config"})
    if not is_wrapper(config):
        return index
    try:
        return replace(index, config=language_config(config), part_of=str(config["architectures"][0]))
    except ArchitectureError:  # the result says why
        return index


def _known(index: CheckpointIndex, source: str, found: FamilyCheck) -> Family | None:
    """Return the family of the architecture; None: there is none, which is noted with the nearest ones."""
    if is_wrapper(index.config):
        found.problems.append(refusal(index.config, source))
        return None
    architecture = architecture_of(index.config, source) or "none"
    family = find(architecture)
    if family is None:
        found.nearest = nearest(architecture, index.config, index.tensors)[:_NEAREST]
        found.problems.append(unsupported(architecture, found.nearest[0]))
    return family


def _account(index: CheckpointIndex, family: Family, options: MiniatureOptions, found: FamilyCheck) -> bool:
    """Account for tensors of the checkpoint, or of transformers' small model of the config, and for what the graph reads.

    Returns whether all add up.
    """
    before = len(found.problems)
    try:
        if index.tensors:
            ignored = frozenset(options.ignored_keys)
            config = from_hugging_face(index.config, options.architecture, "float32", family.config, ignored)
            found.accounting = accounting(index, family, config)
        else:
            found.accounting, config = _of_miniature(options)
            found.is_of_miniature = True
    except OrchestratorError as error:
        found.problems.append(error)
    else:
        found.problems += _tensor_problems(found.accounting, family, found.is_of_miniature)
        found.problems += _target_problems(family, config)
    return len(found.problems) == before


def _of_miniature(options: MiniatureOptions) -> tuple[Accounting, ModelConfig]:
    """Account for the tensors of transformers' small model of a config.json. Raises MiniatureError."""
    from orchestrator.work.miniature.model import new_model, save
    from orchestrator.work.miniature.proof import paired

    with tempfile.TemporaryDirectory(prefix="family-check-") as folder:
        pair = paired(options, Path(folder))
        save(new_model(pair.theirs), Path(folder, "model"))
        return accounting(read_source(str(Path(folder, "model")))[0], pair.family, pair.ours), pair.ours


def _target_problems(family: Family, config: ModelConfig) -> Iterable[OrchestratorError]:
    said = {
        "are bound and not written": f"the graph reads weights that no rule of {family.name} writes",
        "are written and not bound": f"rules of {family.name} write weights that the graph does not read",
        "are written twice": f"more than one rule of {family.name} writes",
    }
    for problem, names in disagreements(family, StageOptions.of(config, Topology(1, 1), 0)).items():
        yield WeightMapError(f"{said[problem]}: {as_kinds(names)}", _TARGETS)


def _tensor_problems(found: Accounting, family: Family, is_of_miniature: bool) -> Iterable[OrchestratorError]:
    where = "transformers' model of this config.json" if is_of_miniature else "the checkpoint"
    if found.unread:
        yield WeightMapError(
            f"{family.name} has no rule for {len(found.unread)} tensors of {where}: {as_kinds(found.unread)}",
            "Add a rule that reads them, or an Ignored entry with the reason, to the family's table.",
        )
    if found.missing:
        yield WeightMapError(
            f"rules of {family.name} read {len(found.missing)} tensors that {where} does not have: {as_kinds(found.missing)}",
            "Correct the names in the family's rules, or let a rule apply only where config.json says so (`when`).",
        )
    if found.misshapen:
        first = f"{found.misshapen[0]}" + (f", and {len(found.misshapen) - 1} more" if len(found.misshapen) > 1 else "")
        yield WeightMapError(
            f"{len(found.misshapen)} tensors of {where} have another shape or dtype than config.json says: {first}",
            "Correct the dimensions of the rule's part, or how config.json gives the size.",
        )


def as_kinds(names: Iterable[str]) -> str:
    """Return names as kinds with the number of tensors: model.layers.*.self_attn.q_norm.weight (32)."""
    counts = Counter(map(kind_of, names))
    return bounded(", ".join(f"{kind} ({count})" for kind, count in counts.items()), MESSAGE_BYTES // 2)


def _compute(options: MiniatureOptions, found: FamilyCheck) -> None:
    """Compare a small model of the config with transformers."""
    from orchestrator.work.miniature.proof import prove

    found.is_computed = True
    with tempfile.TemporaryDirectory(prefix="family-check-") as folder:
        try:
            found.miniature = prove(options, Path(folder), lambda done, total: None)
        except OrchestratorError as error:
            found.problems.append(type(error)(error.message, _DIFFERS))


def _default_problems(config: Mapping[str, Any], family: Family) -> Iterable[OrchestratorError]:
    """Compare the defaults of the table with those of the config class that transformers picks for the model."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    from orchestrator.work.miniature.model import class_defaults

    kind = config.get("model_type")
    if kind not in CONFIG_MAPPING:
        return
    name, theirs = CONFIG_MAPPING[kind].__name__, class_defaults(CONFIG_MAPPING[kind])
    read = family.config.defaults
    other = [f"{key} {value!r} ({name}: {theirs[key]!r})" for key, value in read.items() if key in theirs and theirs[key] != value]
    if other:
        yield ArchitectureError(
            f"defaults of {family.name} are not those of {name}: {', '.join(other)}", "Correct `defaults` of the family's table."
        )
    unknown = unknown_keys({key: value for key, value in theirs.items() if key not in config}, family.config)
    if unknown:
        yield ArchitectureError(
            f"{name} has keys that {family.name} does not know, and config.json may have them: {', '.join(unknown)}",
            "Add each to `defaults` of the family's table, or to `passed_over` if the model's code does not read it.",
        )


def _compute_defaults(options: MiniatureOptions, family: Family, found: FamilyCheck) -> None:
    """Compute a small model of the config without the keys that are no sizes, so that both sides read their defaults."""
    from orchestrator.work.miniature.proof import paired, prove

    kept = {*REQUIRED, *family.config.required, "model_type", "architectures"}
    bare = {key: value for key, value in options.config.items() if key in kept or type(value) is int}
    left_out = sorted(key for key in options.config if key not in bare and key in (*family.config.defaults, *ROTARY_KEYS))
    options = options.model_copy(update={"config": bare})
    with tempfile.TemporaryDirectory(prefix="family-check-") as folder:
        try:
            paired(options, Path(folder, "pair"))
        except OrchestratorError as error:
            found.defaults = f"not compared: {error.message}"
            return
        try:
            prove(options, Path(folder, "proof"), lambda done, total: None)
            found.defaults = "read as transformers reads them"
        except OrchestratorError as error:
            found.problems.append(type(error)(f"without {', '.join(left_out)} in config.json: {error.message}", _DEFAULTS))
