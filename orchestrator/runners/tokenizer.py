"""The tokenizer and chat template of a release, read as transformers reads them."""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from orchestrator.base.errors import SpecError

Message = Mapping[str, str]
"""A message of a chat: role and content."""
_SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token")


class Tokenizer:
    """tokenizer.json, and the chat template of tokenizer_config.json or chat_template.jinja."""

    def __init__(self, folder: Path) -> None:
        """Raises SpecError when the folder has no tokenizer.json."""
        import tokenizers

        path = folder / "tokenizer.json"
        if not path.is_file():
            raise SpecError(
                "the release has no tokenizer.json, so it reads token ids only",
                "Load the source's tokenizer with transformers' AutoTokenizer, save it beside the weights, and build again.",
            )
        self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        config = _read(folder / "tokenizer_config.json")
        self._special = {name: _text(config[name]) for name in _SPECIAL if config.get(name) is not None}
        self._template = _template(folder, config)

    @property
    def has_template(self) -> bool:
        """Whether the model was trained on chats of a known form."""
        return self._template is not None

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        """Return the tokens of a chat, up to where the model answers. Raises SpecError when the template refuses it."""
        import jinja2

        assert self._template is not None
        try:
            text = (
                _environment()
                .from_string(self._template)
                .render(messages=list(messages), add_generation_prompt=True, **self._special)
            )
        except jinja2.TemplateError as error:
            raise SpecError(f"the model's chat template refuses this chat: {error}", "Use --raw, or other messages.") from None
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def encode(self, text: str) -> list[int]:
        """Return the tokens of a text to continue, with the special tokens that begin one."""
        return list(self._tokenizer.encode(text).ids)

    def decode(self, tokens: Iterable[int]) -> Iterator[str]:
        """Yield the text of tokens as they arrive, in pieces that are whole characters; special tokens have none."""
        import tokenizers

        stream = tokenizers.decoders.DecodeStream(skip_special_tokens=True)
        for token in tokens:
            piece = stream.step(self._tokenizer, token)
            if piece:
                yield piece


def _template(folder: Path, config: Mapping[str, Any]) -> str | None:
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text("utf-8")
    found = config.get("chat_template") or _read(folder / "chat_template.json").get("chat_template")
    if isinstance(found, list):  # named templates
        found = next((each.get("template") for each in found if each.get("name") == "default"), None)
    return found if isinstance(found, str) else None


def _environment() -> Any:
    """Return the environment of a chat template, as transformers defines it. A template comes from a stranger: it is confined."""
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment


def _refuse(message: str) -> NoReturn:
    import jinja2

    raise jinja2.TemplateError(message)


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    found = json.loads(path.read_bytes())
    return found if isinstance(found, dict) else {}


def _text(token: Any) -> str:
    return str(token["content"]) if isinstance(token, dict) else str(token)
