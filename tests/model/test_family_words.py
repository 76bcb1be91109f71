"""Words of a family's table that mean nothing."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from orchestrator.families import FAMILIES
from orchestrator.model.config_table import ExpertTable
from orchestrator.model.family_words import wrong_words
from orchestrator.model.rules import Ignored, Part, Rule

LLAMA = FAMILIES["llama"]


@pytest.mark.parametrize("family", FAMILIES)
def test_words_of_every_family_are_known(family: str) -> None:
    assert list(wrong_words(FAMILIES[family])) == []


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"constants": {"norm_placment": "post"}}, "constants: 'norm_placment' is no field of ModelConfig"),
        ({"constants": {"norm_placement": "before"}}, "constants: norm_placement is 'before'. Input should be 'pre', 'post'"),
        ({"derived": {"attn_bais": ("is", "attention_bias")}}, "derived: 'attn_bais' is no field of ModelConfig"),
        ({"derived": {"attention_scale": ("root", "rms_norm_eps")}}, "derived: 'root' of attention_scale is no transform: is"),
        ({"derived": {"attention_scale": ("is", "scale")}}, "derived: attention_scale reads the key 'scale', which defaults"),
        ({"windows": "evry_other"}, "windows: 'evry_other' is no rule: none, all"),
        ({"activation": "hidden_activation"}, "activation: the key 'hidden_activation' is not in defaults"),
        ({"epsilon": "norm_eps"}, "epsilon: the key 'norm_eps' is not in defaults"),
        ({"experts": ExpertTable(count="n", size="s", layers="none")}, "experts.layers: 'none' is no rule: all"),
        ({"experts": ExpertTable(count="n", size="s", constants={"scorring": 1})}, "experts.constants: 'scorring' is no field"),
    ],
)
def test_wrong_word_of_a_config_table_is_named_with_its_place(changes: dict[str, Any], said: str) -> None:
    (found,) = wrong_words(replace(LLAMA, config=replace(LLAMA.config, **changes)))
    assert found.startswith(said)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rules": (Rule("a", (Part("b", ("hiden",)),)),)}, "shape: 'hiden' is no size: hidden, q"),
        ({"rules": (Rule("a", (), when={"moe.biased": True}),)}, "when: 'moe.biased' is no field of ModelConfig (rule of a)"),
        ({"ignored": (Ignored("a", "why", when={"tied": True}),)}, "when: 'tied' is no field of ModelConfig (Ignored entry of a)"),
    ],
)
def test_wrong_word_of_a_rule_is_named_with_its_target(changes: dict[str, Any], said: str) -> None:
    (found,) = wrong_words(replace(LLAMA, **changes))
    assert found.startswith(said)
