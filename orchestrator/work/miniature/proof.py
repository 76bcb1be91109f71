"""Compare both sides of the miniature, and explain a difference."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from orchestrator.base.errors import MiniatureError, OrchestratorError
from orchestrator.families import family_named
from orchestrator.model.config import ModelConfig
from orchestrator.model.config_hugging_face import from_hugging_face
from orchestrator.model.rules import Family
from orchestrator.planning.facts import Miniature, MiniatureCase, MiniatureThreshold
from orchestrator.planning.options import MiniatureOptions
from orchestrator.work.as_hugging_face import with_rotated_part
from orchestrator.work.miniature.first_difference import first_difference
from orchestrator.work.miniature.model import class_defaults, loaded_config, logits_of, new_model, save
from orchestrator.work.miniature.prompts import Prompt, crossable, prompts
from orchestrator.work.miniature.ranks import Layout, Ranks, convert, layouts
from orchestrator.work.miniature.scaling import EXPERTS, Scaling, Threshold

Floats = npt.NDArray[np.floating]
Progress = Callable[[int, int], None]
_LEFT_OUT = ("quantization_config", "auto_map")
"""Keys that describe the files, not the model."""
_SEEDS = 2
"""Seeds to try: rounding may decide a tie between experts differently, so a failure must repeat with other weights."""


@dataclass(frozen=True)
class Pair:
    """The miniature as read by both sides."""

    theirs: Any
    """Config object of transformers."""
    config: dict[str, Any]
    """Scaled-down config.json."""
    family: Family
    """Family with its defaults scaled down."""
    ours: ModelConfig
    thresholds: tuple[Threshold, ...]

    @property
    def prompts(self) -> list[Prompt]:
        return prompts((threshold.tokens for threshold in crossable(self.thresholds)), self.ours.vocab_size)


@dataclass(frozen=True)
class Case:
    """Result of one text on one layout."""

    layout: Layout
    prompt: Prompt
    errors: Floats
    """Relative error by position."""
    expected: Floats
    """Logits of transformers [tokens, vocabulary]."""
    model: Path
    """Folder of the miniature's files."""
    seed: int
    """Seed of the miniature's weights."""


def prove(options: MiniatureOptions, scratch: Path, progress: Progress) -> Miniature:
    """Run every case. Raises MiniatureError for a difference, or a config that either side refuses."""
    pair = paired(options, scratch)
    for seed in range(_SEEDS if pair.ours.moe else 1):
        cases = list(run(pair, scratch / f"seed{seed}", seed, progress))
        wrong = [case for case in cases if case.errors.max() > options.max_relative_error]
        if not wrong:
            return _record(pair, cases, options)
    raise _failure(pair, cases, wrong, options, scratch)


def paired(options: MiniatureOptions, scratch: Path) -> Pair:
    """Scale the config once, and let each side read it with its own defaults scaled alike."""
    family = family_named(options.family)
    config = _named({key: value for key, value in options.config.items() if key not in _LEFT_OUT}, family)
    whole = _theirs(config, scratch / "whole", "config.json")
    defaults = class_defaults(type(whole))
    kinds: list[Any] = [getattr(whole, "layer_types", None) or []]
    ours = _ours(config, family, options)
    kinds += [getattr(whole, "no_rope_layers", None) or [], ours.rotary_layers or []]
    kinds += [ours.window_layers or [], (ours.moe and ours.moe.layers) or []]
    scaling = Scaling(config, defaults, [family.config.defaults], kinds)
    small = scaling.scaled(config)
    missing = {key: value for key, value in scaling.scaled_only(defaults).items() if key not in config}
    if any(key in config for key in EXPERTS):
        missing = {key: value for key, value in missing.items() if key not in EXPERTS}
    family = replace(family, config=replace(family.config, defaults=scaling.scaled(family.config.defaults)))
    return Pair(
        theirs=_theirs({**small, **missing}, scratch / "small", "config.json, scaled down,"),
        config=small,
        family=family,
        ours=_ours(small, family, options),
        thresholds=tuple(scaling.thresholds()),
    )


def _named(config: dict[str, Any], family: Family) -> dict[str, Any]:
    """Return `config` with a model type that transformers knows: other formats lack it, and a spec may name another family."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    if config.get("model_type") in CONFIG_MAPPING_NAMES or not family.config.model_types:
        return config
    return {**config, "model_type": family.config.model_types[0]}


def _theirs(config: Mapping[str, Any], folder: Path, what: str) -> Any:
    try:
        return loaded_config(with_rotated_part(config), folder)
    except Exception as error:  # transformers may raise anything for an unknown value
        raise MiniatureError(
            f"transformers refuses {what} of the model: {_line(error)}",
            "The proof compares with transformers. Use the publisher's config.json unchanged.",
        ) from error


def _ours(config: Mapping[str, Any], family: Family, options: MiniatureOptions) -> ModelConfig:
    try:
        found = from_hugging_face(config, options.architecture, "float32", family.config, frozenset(options.ignored_keys))
    except OrchestratorError as error:
        raise MiniatureError(f"config.json of the model, scaled down, cannot be built: {error.message}", error.advice) from error
    return found.model_copy(update=options.layout)


def _line(error: BaseException) -> str:
    """Return the first lines of another program's error as one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def run(pair: Pair, scratch: Path, seed: int, progress: Progress) -> Iterator[Case]:
    """Compute every text on both sides, and on ours in every layout. Raises MiniatureError."""
    texts, wanted = pair.prompts, layouts(pair.ours)
    try:
        model = new_model(pair.theirs, seed)
        save(model, scratch / "model")
        expected = [logits_of(model, text.calls()) for text in texts]
    except Exception as error:  # any error of transformers
        raise MiniatureError(f"transformers cannot run the miniature of this config.json: {_line(error)}") from error
    longest = max(len(text.tokens) for text in texts)
    for number, layout in enumerate(wanted):
        folder = scratch / f"layout{number}"
        try:
            weights = convert(scratch / "model", folder, pair.family, pair.ours, layout.topology)
            ranks = Ranks(pair.ours, layout.topology, weights, longest)
            for text, values in zip(texts, expected, strict=True):
                yield Case(layout, text, _errors(ranks.logits(text), values), values, scratch / "model", seed)
        except OrchestratorError as error:
            raise MiniatureError(
                f"the miniature of this config.json, made by transformers, cannot be built ({layout.name}): {error.message}",
                error.advice,
            ) from error
        progress(number + 1, len(wanted))


def _errors(ours: Floats, theirs: Floats) -> Floats:
    """Return max |ours - theirs| / max |theirs| by position; infinite where a value is not finite."""
    difference = np.abs(ours.astype(np.float64) - theirs).max(axis=-1)
    scale = np.maximum(np.abs(theirs).max(axis=-1), np.finfo(np.float32).tiny)
    relative: Floats = np.where(np.isfinite(difference), difference / scale, np.inf)
    return relative


def _record(pair: Pair, cases: list[Case], options: MiniatureOptions) -> Miniature:
    by_layout: dict[str, list[Case]] = {}
    for case in cases:
        by_layout.setdefault(case.layout.name, []).append(case)
    crossed = crossable(pair.thresholds)
    return Miniature(
        num_layers=pair.ours.num_hidden_layers,
        tolerance=options.max_relative_error,
        cases=tuple(
            MiniatureCase(
                ranks=name,
                num_prompts=len(found),
                num_positions=sum(len(case.errors) for case in found),
                max_relative_error=max(float(case.errors.max()) for case in found),
            )
            for name, found in by_layout.items()
        ),
        thresholds=tuple(
            MiniatureThreshold(key=each.key, value=each.value, tokens=each.tokens, crossed=each in crossed)
            for each in pair.thresholds
        ),
    )


def _failure(pair: Pair, cases: list[Case], wrong: list[Case], options: MiniatureOptions, scratch: Path) -> MiniatureError:
    """Return the error that names the first wrong case, its first wrong position, and what the wrong cases have in common."""
    first = wrong[0]
    worst = max(float(case.errors.max()) for case in wrong)
    position = int(np.flatnonzero(first.errors > options.max_relative_error)[0])
    prompt = first.prompt
    crossed = ", ".join(prompt.crossed(pair.thresholds)) or "no threshold"
    return MiniatureError(
        f"the model of this config.json does not compute what it computes in transformers: relative error {worst:.2g} > "
        f"{options.max_relative_error:g} in {len(wrong)} of {len(cases)} cases. First: {first.layout.name}, a text of "
        f"{len(prompt.tokens)} tokens, {prompt.prefill} in prefill, longer than {crossed}, from position {position} on. "
        f"{_located(pair, first, options, scratch / 'located')}{_suspect(pair, cases, wrong)}"
        f"{_suspected_keys(pair, first, options, scratch / 'without')}"
    )


def _located(pair: Pair, case: Case, options: MiniatureOptions, scratch: Path) -> str:
    """Return a sentence that names the first layer and part that differ."""
    weights = convert(case.model, scratch, pair.family, pair.ours, case.layout.topology)
    ranks = Ranks(pair.ours, case.layout.topology, weights, len(case.prompt.tokens), observed=True)
    return first_difference(new_model(pair.theirs, case.seed), ranks, case.prompt, options.max_relative_error)


def _suspect(pair: Pair, cases: list[Case], wrong: list[Case]) -> str:
    """Return a sentence about the thresholds that separate the wrong cases from the right ones."""
    names = {case.layout.name for case in wrong}
    right = [case for case in cases if case not in wrong]
    if names < {case.layout.name for case in cases}:
        return f"Only {' and '.join(sorted(names))}: suspect how the model is split."
    shortest = min(len(case.prompt.tokens) for case in wrong)
    longest = max((len(case.prompt.tokens) for case in right), default=shortest)
    between = [each for each in pair.thresholds if longest <= each.tokens < shortest]
    if between:
        named = " or ".join(f"{each.key} {each.value}" for each in between)
        return f"Texts of up to {longest} tokens are right: suspect {named} ({between[0].tokens} here) and the key that enables it."
    return "Short texts are wrong too: suspect a key that is no length (activation, norms, caps, experts, rotary base)."


def _suspected_keys(pair: Pair, case: Case, options: MiniatureOptions, scratch: Path) -> str:
    """Return a sentence naming keys of config.json without which our result of a wrong case would be right; empty: no key."""
    found = []
    for number, key in enumerate(pair.config):
        without = {name: value for name, value in pair.config.items() if name != key}
        try:
            ours = _ours(without, pair.family, options)
            if ours == pair.ours:
                continue
            weights = convert(case.model, scratch / str(number), pair.family, ours, case.layout.topology)
            logits = Ranks(ours, case.layout.topology, weights, len(case.prompt.tokens)).logits(case.prompt)
        except OrchestratorError:
            continue  # a key that is required
        if _errors(logits, case.expected).max() <= options.max_relative_error:
            found.append(key)
    return f" Read here without {' or without '.join(found)}, that text would be right." if found else ""
