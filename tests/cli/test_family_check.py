"""`orchestrator family check`: what it says of right models, of unknown ones, and of broken tables."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from orchestrator.cli.commands import app
from orchestrator.families import FAMILIES
from orchestrator.families.nearest import nearest, supported
from orchestrator.family_check import as_kinds, check_family
from tests.support.broken_families import BROKEN
from tests.support.families import TINY, tiny_config_json, write_tiny
from tests.support.wrappers import write_wrapper


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny("llama", tmp_path_factory.mktemp("llama") / "model")


def config_file(folder: Path, config: dict[str, Any]) -> str:
    path = folder / "config.json"
    path.write_text(json.dumps(config))
    return str(path)


def test_family_check_of_a_known_checkpoint_finds_nothing(llama: Path) -> None:
    found = check_family(str(llama))
    assert (found.family, found.problems, found.is_of_miniature) == ("llama", [], False)
    assert found.miniature is not None


@pytest.mark.parametrize("family", ["qwen3", "mixtral", "deepseek_v3", "gemma3"])
def test_family_check_of_a_config_json_alone_accounts_for_the_tensors_of_transformers(family: str, tmp_path: Path) -> None:
    found = check_family(config_file(tmp_path, tiny_config_json(family)))
    assert (found.family, found.problems, found.is_of_miniature) == (family, [], True)


def test_family_check_of_a_larger_model_checks_its_language_model(tmp_path: Path) -> None:
    write_wrapper("LlavaForConditionalGeneration", tmp_path / "model")
    for source in (tmp_path / "model", tmp_path / "model" / "config.json"):
        found = check_family(str(source))
        assert (found.part_of, found.family, found.problems) == ("LlavaForConditionalGeneration", "llama", [])


@pytest.mark.parametrize(
    ("broken", "says"),
    [
        ("no rule for the MLP's second linear", ["no rule for 3 tensors of the checkpoint: model.layers.*.mlp.down_proj"]),
        (
            "another name for a norm",
            ["model.layers.*.post_attention_layernorm.weight (3)", "model.layers.*.ffn_norm.weight (3)"],
        ),
        ("gate and up exchanged", ["The first part that differs: MLP of layer 0"]),
        ("keys as wide as queries", ["model.layers.0.self_attn.k_proj.weight is [32, 64], config.json says [64, 64], and 2 more"]),
        ("a key of config.json that the table lacks", ["has keys that this family does not know: 'rms_norm_eps'"]),
        ("a wrong scale of attention", ["The first part that differs: attention of layer 0"]),
        (
            "a target that the graph does not have",
            [
                "the graph reads weights that no rule of llama writes: transformer.layers.*.post_layernorm.weight (3)",
                "llama write weights that the graph does not read: transformer.layers.*.pre_feedforward_layernorm.weight (3)",
            ],
        ),
        ("a rule too many", ["more than one rule of llama writes: transformer.layers.*.post_layernorm.weight (3)"]),
        ("a misspelt condition", ["when: 'tie_word_embedding' is no field of ModelConfig (rule of lm_head.weight)"]),
        ("a misspelt constant", ["constants: 'norm_placment' is no field of ModelConfig"]),
        ("another default", ["defaults of llama are not those of LlamaConfig: rms_norm_eps 1e-05 (LlamaConfig: 1e-06)"]),
        ("another default of the rotary base", ["rope_parameters", "first part that differs: attention of layer 0"]),
    ],
)  # fmt: skip
def test_family_check_of_a_broken_table_says_what_is_broken(
    broken: str, says: list[str], llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(FAMILIES, "llama", BROKEN[broken])
    messages = "\n".join(problem.message for problem in check_family(str(llama)).problems)
    assert all(text in messages for text in says), messages


def test_every_broken_table_is_checked() -> None:
    assert len(BROKEN) >= 11


def test_family_check_of_a_right_table_says_that_defaults_were_compared(llama: Path) -> None:
    assert check_family(str(llama)).defaults == "read as transformers reads them"


def test_nearest_family_is_the_one_with_the_fewest_differences_of_tensors_and_keys(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = write_tiny("vaultgemma", tmp_path / "model")
    monkeypatch.delitem(FAMILIES, "vaultgemma")
    found = check_family(str(model))
    assert found.nearest[0].family == "gemma2", "cohere lacks a rule and two keys, gemma2 has two norms too many"
    assert (len(found.nearest[0].missing), found.nearest[0].unread, found.nearest[0].unknown_keys) == (2, (), ())


def test_family_check_of_an_unknown_architecture_names_the_nearest_families(tmp_path: Path) -> None:
    model = write_tiny("qwen3", tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "architectures": ["BraveNewForCausalLM"], "mystery": 3}))
    found = check_family(str(model))
    assert found.nearest[0].family == "qwen3"
    assert found.nearest[0].unknown_keys == ("mystery",)
    (problem,) = found.problems
    assert (
        "unsupported architecture 'BraveNewForCausalLM'. Nearest is qwen3, which reads 14 of 14 kinds of tensors" in problem.message
    )
    tried = check_family(str(model), "qwen3", ["mystery"])
    assert tried.problems == []


@pytest.mark.parametrize("family", TINY)
def test_nearest_family_of_a_model_of_a_family_is_itself_or_reads_it_as_well(family: str, tmp_path: Path) -> None:
    from orchestrator.checkpoints import read_source

    index, _ = read_source(str(write_tiny(family, tmp_path / "model")))
    found = nearest(TINY[family].model, index.config, index.tensors)
    own = next(each for each in found if each.family == family)
    assert (found[0].read, len(found[0].unread)) == (own.read, 0)


def test_switches_and_unknown_keys_are_all_reported(tmp_path: Path) -> None:
    config = {**tiny_config_json("qwen2"), "clip_qkv": 8.0, "lm_head_bias": True, "depth": 3, "width": 4}
    messages = [problem.message for problem in check_family(config_file(tmp_path, config)).problems]
    assert [text for text in ("clip_qkv", "lm_head_bias", "'depth', 'width'") if not any(text in each for each in messages)] == []


def test_family_check_of_an_unknown_key_says_where_a_table_names_it(tmp_path: Path) -> None:
    (problem,) = check_family(config_file(tmp_path, {**tiny_config_json("llama"), "mystery": 1})).problems
    assert "add what the model's code reads to `defaults`" in problem.advice


def test_command_exits_with_the_code_of_the_first_problem_and_prints_json(tmp_path: Path, llama: Path) -> None:
    runner = CliRunner()
    assert runner.invoke(app, ["family", "check", str(llama)]).exit_code == 0
    wrong = config_file(tmp_path, {**tiny_config_json("llama"), "mystery": 1})
    result = runner.invoke(app, ["family", "check", wrong, "--json"])
    assert result.exit_code == 12
    facts = json.loads(result.stdout)
    assert facts["family"] == "llama"
    assert "mystery" in facts["problems"][0]["message"]


def test_list_prints_every_family_and_architecture() -> None:
    result = CliRunner().invoke(app, ["family", "list", "--json"])
    listed = json.loads(result.stdout)["families"]
    assert listed.keys() == FAMILIES.keys()
    assert all(tuple(listed[name]["architectures"]) == family.architectures for name, family in FAMILIES.items())


def test_supported_groups_every_family_once() -> None:
    text = supported()
    assert all(text.count(f" {name},") + text.count(f" {name};") == 1 for name in FAMILIES)


def test_kinds_of_tensors_are_counted_over_layers_and_experts() -> None:
    names = [f"model.layers.{layer}.mlp.experts.{expert}.up_proj.weight" for layer in range(3) for expert in range(4)]
    assert as_kinds([*names, "lm_head.weight"]) == "model.layers.*.mlp.experts.*.up_proj.weight (12), lm_head.weight (1)"
