"""What the networks bind, what the rules write and what `plan` derives of both: three lists that must be one."""

from __future__ import annotations

from dataclasses import replace

import pytest

from orchestrator.base.errors import WeightMapError
from orchestrator.engines.profiles import network_of, resolved
from orchestrator.families import FAMILIES
from orchestrator.model.config import ModelConfig
from orchestrator.model.rules import Rule
from orchestrator.model.stage import StageOptions
from orchestrator.model.topology import Topology
from orchestrator.model.weight_names import bound_names, check_names
from orchestrator.networks import Rendering, decoder_network
from orchestrator.spec.build import BuildConfig
from tests.support.families import TINY, tiny_config

BIASED = {"llama": {"attention_bias": True, "mlp_bias": True}, "gemma3": {"attention_bias": True}, "qwen2_moe": {"qkv_bias": False}}
TOPOLOGIES = (Topology(1, 1), Topology(2, 2), Topology(1, 3))


def configs(family: str) -> list[ModelConfig]:
    plain = tiny_config(family)
    found = [plain, tiny_config(family, tie_word_embeddings=True), tiny_config(family, **BIASED.get(family, {}))]
    split = [plain.model_copy(update={"use_parallel_embedding": True, "embedding_sharding_dim": axis}) for axis in (0, 1)]
    return [*found, *split]


@pytest.mark.parametrize("family", TINY)
def test_bound_names_are_those_of_the_network_and_of_the_rules(family: str) -> None:
    for config in configs(family):
        engine = resolved(config, BuildConfig(max_seq_len=16, max_input_len=8))
        for topology in TOPOLOGIES:
            check_names(FAMILIES[family], config, topology)
            for pp_rank in range(topology.pp):
                stage = StageOptions.of(config, topology, pp_rank)
                derived = list(bound_names(stage))
                network = network_of(stage, engine)
                for rendering in (Rendering.executed(), Rendering.compiled(network)):
                    for tp_rank in range(topology.tp):
                        assert sorted(decoder_network(network, tp_rank, rendering).weight_names()) == sorted(derived)


@pytest.mark.parametrize(
    ("rules", "said"),
    [
        (lambda rules: tuple(rule for rule in rules if "mlp.proj" not in rule.target), "3 weights are bound and not written"),
        (lambda rules: (*rules, rules[-1]), "1 weights are written twice, such as lm_head.weight"),
        (lambda rules: (*rules, replace(rules[3], target="transformer.layers.{layer}.stray.weight")), "written and not bound"),
    ],
    ids=["missing", "twice", "stray"],
)
def test_check_names_of_rules_that_do_not_fit_the_network_is_an_error_of_the_plan(rules: object, said: str) -> None:
    llama = FAMILIES["llama"]
    changed: tuple[Rule, ...] = rules(llama.rules)  # type: ignore[operator]
    config = tiny_config("llama", tie_word_embeddings=True)
    with pytest.raises(WeightMapError, match=said):
        check_names(replace(llama, rules=changed), config, Topology(1, 1))


def test_check_names_of_a_bias_that_the_rules_lack_is_an_error_of_the_plan() -> None:
    config = tiny_config("phi3").model_copy(update={"attn_bias": True})
    with pytest.raises(
        WeightMapError, match=r"3 weights are bound and not written, such as transformer.layers.0.attention.qkv.bias"
    ):
        check_names(FAMILIES["phi3"], config, Topology(1, 1))
