"""Larger models (vision, speech) around a language model of one of the families: which are known, and the language model's config.

Known are those whose language model computes for text alone what the family computes. The tests compare each with transformers'
larger model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from orchestrator.base.errors import ArchitectureError
from orchestrator.families import FAMILIES
from orchestrator.model.rules import Family

WRAPPERS = frozenset(
    f"{name}ForConditionalGeneration"
    for name in (
        "AyaVision", "Cohere2Vision", "DeepseekVL", "DeepseekVLHybrid", "Exaone4_5_", "Gemma3", "Gemma4", "Glm4v", "Glm4vMoe",
        "GlmAsr", "GotOcr2", "GraniteSpeech", "Idefics2", "Idefics3", "InternVL", "Janus", "KimiK25", "KimiVL", "Kimi_K25",
        "LightOnOcr", "Llama4", "Llava", "LlavaNext", "LlavaNextVideo", "LlavaOnevision", "Mistral3", "Ovis2", "Qwen2Audio",
        "Qwen2VL", "Qwen2_5_VL", "Qwen3ASR", "Qwen3VL", "Qwen3VLMoe", "SmolVLM", "VideoLlama3", "VideoLlava", "VipLlava",
        "Voxtral",
    )
) | {"InternVLChatModel"}  # fmt: skip
"""Architectures whose language model is read from the larger checkpoint."""
REFUSED = {
    "Gemma3nForConditionalGeneration": "its layers have inputs of their own and several streams",
    "Ernie4_5_VLMoeForConditionalGeneration": "its experts are chosen by the kind of token",
    "MllamaForConditionalGeneration": "some of its layers attend to the image",
    "PaliGemmaForConditionalGeneration": "its prompt attends in both directions",
    "Phi4MultimodalForCausalLM": "its linears have adapters (LoRA) by the kind of input",
    "Qwen3OmniMoeForConditionalGeneration": "it speaks with a second language model",
    "Qwen3_5ForConditionalGeneration": "most of its layers are recurrent",
    "Qwen3_5MoeForConditionalGeneration": "most of its layers are recurrent",
}
"""Larger models whose language model is not one of the families -> why."""
_KINDS = {
    "glm4v_moe_text": "glm4_moe",
    "glm4v_text": "glm4",
    "qwen2_5_vl_text": "qwen2",
    "qwen2_vl_text": "qwen2",
    "qwen3_vl_moe_text": "qwen3_moe",
    "qwen3_vl_text": "qwen3",
}
"""model_type of a language model that has another name within a larger model -> the family's. Rotary positions of several axes
(M-RoPE) are equal for text, so its embedding is the plain one."""
_TEXT_KEYS = ("text_config", "llm_config")
_OTHER_KEYS = ("vision_config", "audio_config", "vision_start_token_id", "vision_end_token_id", "vision_token_id",
               "image_token_id", "video_token_id", "audio_token_id")  # fmt: skip
"""Keys of the other parts, in a config.json that describes the language model at its top (Qwen2-VL)."""
_OUTER = ("bos_token_id", "eos_token_id", "pad_token_id", "dtype", "torch_dtype", "transformers_version")
"""Keys that may stand beside text_config."""
_M_ROPE = ("mrope_section", "mrope_interleaved")
_SIZES: dict[str, dict[str, Any]] = {
    "gemma3": {
        "vocab_size": 262208, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26, "num_attention_heads": 8,
        "num_key_value_heads": 4, "head_dim": 256,
    },
    "glm4": {"attention_bias": True},
    "llama": {
        "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
    },
    "mistral": {
        "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "qwen2": {
        "vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 22016, "num_hidden_layers": 32, "num_attention_heads": 32,
    },
}  # fmt: skip
"""Family -> sizes that published files leave out of text_config, because transformers' class has them, and what the class fixes."""

_OF_CLASS: dict[str, dict[str, Any]] = {
    "qwen3_vl_moe_text": {
        "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 24, "num_attention_heads": 16,
        "num_key_value_heads": 16, "max_position_embeddings": 128000, "num_experts": 60, "num_experts_per_tok": 4,
        "moe_intermediate_size": 1408, "rope_theta": 500000.0,
    },
}  # fmt: skip
"""model_type of a language model -> defaults of its class that differ from the family's."""
_FIXED: dict[str, dict[str, Any]] = {"qwen3_vl_moe_text": {"norm_topk_prob": True, "use_sliding_window": False}}
"""model_type of a language model -> keys that its class does not read, and what they would have to say."""
_FUSED_EXPERTS = ("qwen3_vl_moe_text",)
"""Values of model_type of language models whose experts are stored as one tensor, and the family's are not."""


def has_fused_experts(config: Mapping[str, Any]) -> bool:
    """Whether a larger model stores the experts of a layer as one tensor, and the family of its language model does not."""
    return (_text_of(config) or {}).get("model_type") in _FUSED_EXPERTS


def architecture_of(config: Mapping[str, Any], where: str) -> str | None:
    """Return the architecture that config.json of `where` names; None: it names none.

    Raises ArchitectureError if `architectures` is not a list of names, or for a larger model around a language model.
    """
    listed = config.get("architectures")
    if listed is not None and (not isinstance(listed, list) or any(not isinstance(name, str) for name in listed)):
        raise ArchitectureError(
            f"architectures in config.json of {where} is {str(listed)[:60]!r}, not a list of names",
            'Write it as a list, such as ["LlamaForCausalLM"], or set source.family in the spec.',
        )
    if is_wrapper(config):
        raise refusal(config, where)
    return listed[0] if listed else None


def is_wrapper(config: Mapping[str, Any]) -> bool:
    """Whether config.json is of a larger model around a language model."""
    return _text_of(config) is not None or any(isinstance(config.get(key), Mapping) for key in ("vision_config", "audio_config"))


def language_config(config: Mapping[str, Any], has_head: bool | None = None) -> dict[str, Any]:
    """Return config.json of the language model within a larger model.

    Where no file says whether the head is tied to the embedding, it is if the checkpoint has none (`has_head`; None: unknown).
    Raises ArchitectureError, which says why, for a larger model that is not known.
    """
    text = _text_of(config)
    family = _family_of(config, text)
    text = {key: value for key, value in (text or config).items() if key not in ("architectures", *_OTHER_KEYS)}
    kind = text.get("model_type", "")
    found = {key: config[key] for key in _OUTER if key in config} | _SIZES.get(family.name, {})
    found |= _of_class(kind, text) | text | _FIXED.get(kind, {})
    found |= {"architectures": [family.architectures[0]]}
    if text.get("model_type") not in family.config.model_types:
        found["model_type"] = family.config.model_types[0]
    if config.get("tie_word_embeddings") is not None:
        found["tie_word_embeddings"] = config["tie_word_embeddings"]
    elif has_head is not None:
        found.setdefault("tie_word_embeddings", not has_head)
    found.pop("quantization_config", None)
    for key in ("rope_scaling", "rope_parameters"):
        if isinstance(found.get(key), Mapping):
            found[key] = _plain(found[key])
    return found


def _of_class(kind: str, text: Mapping[str, Any]) -> dict[str, Any]:
    """Return the defaults of a language model's class; the number of experts has two names, and config.json holds one."""
    found = dict(_OF_CLASS.get(kind, {}))
    if "num_local_experts" in text:
        found.pop("num_experts", None)
    return found


def refusal(config: Mapping[str, Any], where: str) -> ArchitectureError:
    """Return the error of a larger model that is not read as one. It says whether its language model alone would do."""
    name, text = _name(config), _text_of(config) or {}
    kind = text.get("model_type")
    family = _named(kind)
    if name in REFUSED:
        return ArchitectureError(
            f"{where} is a model of several parts ({name}), and its language model is not one of the families: {REFUSED[name]}",
            "Build another model, or add a family for its language model (docs/add-a-family.md).",
        )
    if family is None:
        return ArchitectureError(
            f"{where} is a model of several parts ({name}), whose language model (text_config) is of an unknown kind: {kind!r}",
            f"Families: {', '.join(sorted(FAMILIES))}. To add one, follow docs/add-a-family.md.",
        )
    return ArchitectureError(
        f"{where} is a model of several parts ({name}), which is not one of those whose language model is read in place. "
        f"Its text_config is a {family}, which is supported",
        "Save the language model as a separate checkpoint, with text_config as its config.json, and build that.",
    )


def _family_of(config: Mapping[str, Any], text: Mapping[str, Any] | None) -> Family:
    family = _named((text or config).get("model_type")) or _named(_within(config))
    if _name(config) not in WRAPPERS or family is None:
        raise refusal(config, "config.json")
    return FAMILIES[family]


def _within(config: Mapping[str, Any]) -> str | None:
    """Return the kind of the language model whose config stands at the top: qwen2_5_vl has a qwen2_5_vl_text."""
    kind = config.get("model_type")
    return f"{kind}_text" if isinstance(kind, str) else None


def _named(kind: object) -> str | None:
    """Return the name of the family of a model_type; None: there is none."""
    kind = _KINDS.get(kind, kind) if isinstance(kind, str) else None
    return next((family.name for family in FAMILIES.values() if kind in family.config.model_types), None)


def _name(config: Mapping[str, Any]) -> str:
    listed = config.get("architectures")
    return str(listed[0]) if isinstance(listed, list) and listed else "no architecture named"


def _text_of(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    found = (config.get(key) for key in _TEXT_KEYS)
    return next((text for text in found if isinstance(text, Mapping)), None)


def _plain(rope: Mapping[str, Any]) -> dict[str, Any]:
    """Return rotary parameters without the axes of images."""
    kept = {key: value for key, value in rope.items() if key not in _M_ROPE}
    return {key: "default" if key in ("type", "rope_type") and value == "mrope" else value for key, value in kept.items()}
