"""The miniature: right models pass, every wrong rule that was once published is caught."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from orchestrator import building
from orchestrator.base.errors import MiniatureError
from orchestrator.events import StepEvent
from orchestrator.families import FAMILIES, family_for
from orchestrator.model import rule_expansion
from orchestrator.model.config import ModelConfig
from orchestrator.model.config_hugging_face import from_hugging_face
from orchestrator.model.rules import Part
from orchestrator.model.stage import StageOptions
from orchestrator.model.topology import Topology
from orchestrator.networks import attention, latent
from orchestrator.planning import preparation
from orchestrator.planning.facts import Miniature
from orchestrator.planning.options import MiniatureOptions
from orchestrator.planning.steps import Kind, Task
from orchestrator.scheduling import commits
from orchestrator.spec.build import BuildSpec
from orchestrator.spec.cluster import ClusterSpec
from orchestrator.spec.decoding import decode
from orchestrator.stores import open_store
from orchestrator.work.miniature import proof
from orchestrator.work.miniature.first_difference import first_difference
from orchestrator.work.miniature.model import class_defaults, loaded_config, new_model, parts_of, save
from orchestrator.work.miniature.ranks import Layout, Ranks, convert
from orchestrator.work.miniature.scaling import Scaling, is_count
from tests.support.families import TINY, tiny_config_json, write_tiny
from tests.support.here import HereCluster, run_here
from tests.support.wrong_graphs import WRONG_GRAPHS, WrongGraph
from tests.support.wrong_rules import WRONG_RULES, Rule, WrongRule, hub_config


def options_of(config: Mapping[str, Any], **changes: Any) -> MiniatureOptions:
    architecture = config["architectures"][0]
    return MiniatureOptions(config=dict(config), family=family_for(architecture).name, architecture=architecture, **changes)


def prove(config: Mapping[str, Any], scratch: Path, **changes: Any) -> Miniature:
    return proof.prove(options_of(config, **changes), scratch, lambda done, total: None)


def plant(rule: Rule, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every config be read by a wrong rule."""

    def wrong(config: Mapping[str, Any], *rest: Any, **named: Any) -> ModelConfig:
        found = from_hugging_face(config, *rest, **named)
        return found.model_copy(update=rule(config, found))

    monkeypatch.setattr(proof, "from_hugging_face", wrong)


@pytest.fixture
def one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seconds saved: how a model is split has nothing to do with what its config means, and other tests look at the suspects."""
    monkeypatch.setattr(proof, "layouts", lambda config: [Layout(Topology(1, 1))])
    monkeypatch.setattr(proof, "_suspected_keys", lambda *given: "")
    monkeypatch.setattr(proof, "_SEEDS", 1)


@pytest.mark.parametrize("family", TINY)
def test_miniature_of_every_family_is_right_on_all_layouts(family: str, tmp_path: Path) -> None:
    found = prove(tiny_config_json(family), tmp_path)
    names = [case.ranks for case in found.cases]
    assert names == ["one rank", "tp=2", *(["tp=2, ep=2"] if FAMILIES[family].config.experts else []), "pp=2"]
    assert found.max_relative_error < 2e-5


def test_every_family_has_a_tiny_model() -> None:
    assert set(TINY) == set(FAMILIES)


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("wrong", WRONG_RULES, ids=str)
def test_miniature_catches_a_wrong_rule(wrong: WrongRule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(wrong.rule, monkeypatch)
    with pytest.raises(MiniatureError, match="does not compute what it computes in transformers"):
        prove(wrong.config, tmp_path)


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("wrong", WRONG_GRAPHS, ids=str)
def test_miniature_catches_a_mistake_in_the_network_of_a_mixture(
    wrong: WrongGraph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wrong.module, wrong.function, wrong.wrong)
    with pytest.raises(MiniatureError, match="does not compute what it computes in transformers"):
        prove(wrong.config, tmp_path)


def _moe_layers(layers: tuple[bool, ...] | None) -> Rule:
    def rule(_config: Mapping[str, Any], found: ModelConfig) -> dict[str, Any]:
        assert found.moe is not None
        return {"moe": found.moe.model_copy(update={"layers": layers and layers[: found.num_hidden_layers]})}

    return rule


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize(
    ("layers", "said"),
    [(None, "the checkpoint lacks"), ((False,) * 99, "the checkpoint lacks"), ((False, False, True, True, True), "lacks")],
    ids=["dense-taken-for-a-mixture", "mixture-taken-for-dense", "one-layer-less"],
)
def test_miniature_catches_a_layer_of_the_other_kind(
    layers: tuple[bool, ...] | None, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(_moe_layers(layers), monkeypatch)
    with pytest.raises(MiniatureError, match=said):
        prove(hub_config("glm-4.6"), tmp_path)


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("wrong", {json.dumps(each.config): each for each in WRONG_RULES}.values(), ids=str)
def test_miniature_of_the_same_config_read_rightly_passes(wrong: WrongRule, tmp_path: Path) -> None:
    assert prove(wrong.config, tmp_path).max_relative_error < 2e-5


def test_failure_names_layout_text_position_and_the_length_that_is_suspected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(lambda _config, _found: {"sliding_window": None}, monkeypatch)
    with pytest.raises(MiniatureError) as caught:
        prove(hub_config("mistral-7b-v0.1"), tmp_path)
    message = caught.value.message
    assert "First: one rank, a text of 10 tokens, 7 in prefill, longer than sliding_window, from position 8 on." in message
    assert "Texts of up to 8 tokens are right: suspect sliding_window 4096 (8 here) and the key that enables it." in message
    assert caught.value.exit_code == 36
    assert "Nothing was built" in caught.value.advice


def test_failure_of_one_way_to_split_is_said_to_be_that(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stage that takes its own layer numbers for the model's has the windows of other layers."""
    of = StageOptions.of

    def wrong(*given: Any) -> StageOptions:
        return of(*given).model_copy(update={"first_layer": 0})

    monkeypatch.setattr(StageOptions, "of", staticmethod(wrong))
    with pytest.raises(MiniatureError, match=r"First: pp=2, .* Only pp=2: suspect how the model is split"):
        prove(hub_config("gemma-2-2b"), tmp_path)


def test_failure_of_short_texts_suspects_no_length(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(lambda _config, _found: {"hidden_act": "gelu"}, monkeypatch)
    with pytest.raises(
        MiniatureError,
        match=r"from position 0 on. The first part that differs: MLP of layer 0 .* Short texts are wrong too: suspect a key",
    ):
        prove(hub_config("llama-3-8b"), tmp_path)


@pytest.mark.parametrize(
    ("name", "key"),
    [("llama window honoured", "sliding_window"), ("llama rope_parameters before rope_scaling", "rope_parameters")],
)
def test_failure_names_the_key_without_which_the_text_would_be_right(
    name: str, key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (wrong,) = [each for each in WRONG_RULES if each.name == name]
    plant(wrong.rule, monkeypatch)
    with pytest.raises(MiniatureError, match=f"Read here without {key}, that text would be right."):
        prove(wrong.config, tmp_path)


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize(
    "config",
    [
        hub_config("phi-3.5-mini"),
        hub_config("phi-4-mini"),
        hub_config("llama-2-7b", rope_scaling={"type": "dynamic", "factor": 4.0}),
    ],
    ids=["longrope", "longrope of a part of the head", "dynamic"],
)
def test_miniature_catches_frequencies_that_are_chosen_once_for_all_lengths(
    config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert prove(config, tmp_path / "right").max_relative_error < 2e-5
    monkeypatch.setattr(ModelConfig, "rotary_depends_on_length", lambda self, length: False)
    with pytest.raises(MiniatureError, match="does not compute what it computes in transformers"):
        prove(config, tmp_path / "wrong")


def _keys_not_rotated(monkeypatch: pytest.MonkeyPatch) -> None:
    rotate = latent.rotate
    monkeypatch.setattr(latent, "rotate", lambda graph, shape, x, rotary: x if "k_rope" in x else rotate(graph, shape, x, rotary))


def _key_expansion_of_the_next_head(monkeypatch: pytest.MonkeyPatch) -> None:
    read = rule_expansion.Expander._read

    def wrong(self: Any, part: Part, layer: int, expert: int = 0, head: int | None = None) -> Any:
        moved = head is not None and part.section == 0
        return read(self, part, layer, expert, (head + 1) % self.config.num_attention_heads if moved and head is not None else head)

    monkeypatch.setattr(rule_expansion.Expander, "_read", wrong)


def _latent_without_its_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latent, "rms_norm", lambda graph, shape, x, weight, *rest, **named: x)


@pytest.mark.usefixtures("one_rank")
def test_miniature_catches_sinks_that_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The slot of zeros is hidden like any other that a token does not attend to."""
    monkeypatch.setattr(attention, "with_sinks", lambda _graph, _shape, mask, _prefix: mask)
    with pytest.raises(MiniatureError, match="does not compute what it computes in transformers"):
        prove(hub_config("gpt-oss-20b-bf16"), tmp_path)


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("fault", [_keys_not_rotated, _key_expansion_of_the_next_head, _latent_without_its_norm])
def test_miniature_catches_a_fault_in_latent_attention(
    fault: Callable[[pytest.MonkeyPatch], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fault(monkeypatch)
    with pytest.raises(MiniatureError, match="does not compute what it computes in transformers"):
        prove(hub_config("deepseek-v3-bf16"), tmp_path)


def test_config_that_transformers_refuses_is_said_to_be_refused_by_it(tmp_path: Path) -> None:
    config = hub_config("phi-3.5-mini")
    config["rope_scaling"]["long_factor"] = config["rope_scaling"]["long_factor"][1:]
    with pytest.raises(MiniatureError, match=r"transformers refuses config.json of the model: .*long_factor"):
        prove(config, tmp_path)


def test_weights_that_do_not_fit_the_config_as_read_here_are_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(lambda _config, _found: {"tie_word_embeddings": False}, monkeypatch)
    with pytest.raises(MiniatureError, match=r"made by transformers, cannot be built \(one rank\): .*lm_head"):
        prove(hub_config("gemma-2-2b"), tmp_path)


def test_wrong_default_of_a_size_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each side's default is scaled by the same map, so that two defaults stay two."""
    config = hub_config("mistral-7b-v0.1", "num_key_value_heads")
    assert prove(config, tmp_path / "right").max_relative_error < 2e-5
    family = FAMILIES["mistral"]
    table = replace(family.config, defaults={**family.config.defaults, "num_key_value_heads": 4})
    monkeypatch.setitem(FAMILIES, "mistral", replace(family, config=table))
    with pytest.raises(MiniatureError, match="made by transformers, cannot be built"):
        prove(config, tmp_path / "wrong")


def test_wrong_default_of_a_window_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = hub_config("gemma-2-2b", "sliding_window")
    assert prove(config, tmp_path / "right").max_relative_error < 2e-5
    family = FAMILIES["gemma2"]
    table = replace(family.config, defaults={**family.config.defaults, "sliding_window": 8192})
    monkeypatch.setitem(FAMILIES, "gemma2", replace(family, config=table))
    with pytest.raises(MiniatureError, match="suspect sliding_window 4096"):
        prove(config, tmp_path / "wrong")


UNSCALED = {"query_pre_attn_scalar", "hidden_size_per_layer_input", "vocab_size_per_layer_input"}
"""Numbers of transformers' config classes that are no size and no length, or of models that are refused."""


@pytest.mark.parametrize("family", FAMILIES)
def test_no_size_or_length_that_transformers_knows_is_left_as_it_is(family: str, tmp_path: Path) -> None:
    """A length that is not scaled down is crossed by no text: a new key of a family has to be named in scaling.py."""
    defaults = class_defaults(type(loaded_config({"model_type": FAMILIES[family].config.model_types[0]}, tmp_path)))
    found = Scaling({}, defaults).scaled(defaults)
    kept = {key for key, value in found.items() if is_count(value) and value > 200 and value == defaults[key]}
    assert {key for key in kept if not key.endswith("_token_id")} <= UNSCALED


def test_config_without_a_type_is_read_by_transformers_as_its_family(tmp_path: Path) -> None:
    """GGUF, Meta's and TensorRT-LLM's checkpoints have none."""
    assert prove(hub_config("llama-3-8b", "model_type"), tmp_path).max_relative_error < 2e-5
    with_another = hub_config("llama-3-8b", model_type="somebody's")
    assert prove(with_another, tmp_path / "other", ignored_keys=("model_type",)).max_relative_error < 2e-5


def test_key_that_the_spec_ignores_and_transformers_does_not_is_caught(tmp_path: Path) -> None:
    config = hub_config("gemma-3-270m", use_bidirectional_attention=True)
    with pytest.raises(MiniatureError, match="does not compute what it computes"):
        prove(config, tmp_path, ignored_keys=("use_bidirectional_attention",))


def test_miniature_reports_the_lengths_that_it_crossed(tmp_path: Path) -> None:
    found = prove(hub_config("mistral-7b-v0.1"), tmp_path)
    lengths = [(each.key, each.value, each.tokens, each.crossed) for each in found.thresholds]
    assert lengths == [("sliding_window", 4096, 8, True), ("max_position_embeddings", 32768, 32, True)]


@pytest.mark.parametrize("layout", [{"embedding_sharding_dim": 0}, {"embedding_sharding_dim": 1}])
def test_miniature_has_the_builds_own_layout_of_the_embedding(layout: dict[str, Any], tmp_path: Path) -> None:
    assert prove(hub_config("llama-3-8b"), tmp_path, use_parallel_embedding=True, **layout).max_relative_error < 2e-5


def test_tie_between_experts_is_tried_with_other_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounding may choose another expert than transformers' once; a wrong rule is wrong with all weights."""
    seeds = []
    run = proof.run

    def first_is_a_tie(pair: proof.Pair, scratch: Path, seed: int, progress: proof.Progress) -> Any:
        seeds.append(seed)
        for case in run(pair, scratch, seed, progress):
            yield replace(case, errors=case.errors + (1.0 if seed == 0 else 0.0))

    monkeypatch.setattr(proof, "run", first_is_a_tie)
    assert prove(hub_config("mixtral-8x7b"), tmp_path).max_relative_error < 2e-5
    assert seeds == [0, 1]
    with pytest.raises(MiniatureError):
        prove(hub_config("llama-3-8b"), tmp_path / "dense")


def tiny_plan(source: Path, **sections: Any) -> BuildSpec:
    plain = {
        "source": {"path": str(source)},
        "engine": {"max_batch_size": 1, "max_input_len": 16, "max_seq_len": 32},
        "release": {"name": "tiny", "version": "1"},
        **sections,
    }
    return decode(BuildSpec, plain, "test")


@pytest.mark.parametrize("sections", [{"verification": {"enabled": False}}, {"quantization": {"algorithm": "W8A16"}}], ids=str)
def test_build_whose_miniature_fails_ends_before_anything_long_and_publishes_nothing(
    sections: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_tiny("mistral", tmp_path / "source")
    plant(lambda _config, _found: {"sliding_window": None}, monkeypatch)
    spec, place = tiny_plan(source, **sections), ClusterSpec(store=(tmp_path / "store").as_uri())
    with pytest.raises(MiniatureError, match=r"miniature: the model of this config\.json"):
        building.build(spec, place, open_cluster=lambda _place: OneAtATime())
    store = open_store(place.store)
    assert not commits.committed(store, (step.digest for step in preparation.plan(spec).steps))
    assert not list(store.list("releases/"))


class OneAtATime(HereCluster):
    """A cluster with one slot: what was started first ends first, and is heard of before the next begins."""

    def __init__(self) -> None:
        super().__init__()
        self._waiting: list[Task] = []

    def start(self, task: Task) -> None:
        self._waiting.append(task)
        self._waiting.sort(key=lambda waiting: waiting.order)

    def events(self, timeout_seconds: float | None) -> list[StepEvent]:
        if self._waiting:
            super().start(self._waiting.pop(0))
        return super().events(timeout_seconds)


def test_miniature_as_a_step_commits_what_the_manifest_says_and_is_not_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = preparation.plan(tiny_plan(write_tiny("mistral", tmp_path / "source")))
    outcome = run_here(made, tmp_path / "store", [Kind.MINIATURE])["miniature"]
    found = outcome.facts.miniature
    assert [case.ranks for case in found.cases] == ["one rank", "tp=2", "pp=2"]
    assert "texts longer than sliding_window 5, max_position_embeddings 64" in found.line()
    assert "transformers" in outcome.tools
    assert "tp=2" in outcome.log_tail
    monkeypatch.setattr(proof, "run", lambda *given: pytest.fail("it ran again"))
    other = preparation.plan(tiny_plan(tmp_path / "source", topology={"tp": 2, "pp": 2}, verification={"enabled": False}))
    assert run_here(other, tmp_path / "store", [Kind.MINIATURE])["miniature"] == outcome


@pytest.mark.parametrize("layout", [Topology(1, 1), Topology(2, 1), Topology(1, 2, (1, 2))], ids=["one rank", "tp2", "pp2"])
@pytest.mark.parametrize("family", ["llama", "olmo2", "gemma2", "cohere", "mixtral", "deepseek_v3", "gpt_oss"])
def test_parts_of_a_right_model_agree_with_those_of_transformers(family: str, layout: Topology, tmp_path: Path) -> None:
    pair = proof.paired(options_of(tiny_config_json(family)), tmp_path)
    if layout.pp == 2:
        layout = Topology(1, 2, (1, pair.ours.num_hidden_layers - 1))
    model, text = new_model(pair.theirs), pair.prompts[0]
    save(model, tmp_path / "model")
    weights = convert(tmp_path / "model", tmp_path / "ranks", pair.family, pair.ours, layout)
    ranks = Ranks(pair.ours, layout, weights, len(text.tokens), observed=True)
    assert first_difference(model, ranks, text, 1e-5).startswith("All layers agree")
    layers = pair.ours.num_hidden_layers
    named = {(number, what) for number in range(layers) for what in ("attention", "MLP's input", "MLP", "end")}
    assert named <= ranks.parts.keys()
    assert named <= parts_of(model, text.calls()).keys()


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"embedding_multiplier": 2.0}, "the embedding"),
        ({"norm_epsilon": 0.5}, "attention's input of layer 0"),
        ({"attention_scale": 0.1}, "attention of layer 0"),
        ({"rotary_layers": (True, False, True)}, "attention of layer 1"),
        ({"residual_multiplier": 0.5}, "MLP's input of layer 0"),
        ({"hidden_act": "gelu"}, "MLP of layer 0"),
        ({"final_logit_softcapping": 0.1}, "All layers agree: suspect the last norm, the head"),
    ],
)
def test_miniature_that_differs_names_the_first_layer_and_part(
    changes: dict[str, Any], part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(lambda _config, _found: changes, monkeypatch)
    with pytest.raises(MiniatureError) as caught:
        prove(tiny_config_json("llama"), tmp_path)
    assert part in caught.value.message
