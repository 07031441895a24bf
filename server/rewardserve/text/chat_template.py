"""Messages -> the exact text the model was trained on, by the checkpoint's own template.

The same environment as transformers' chat templates, without transformers: the front must not load torch. That it is
the same is checked at load against what the checkpoint's tokenizer rendered itself (types.Probe).
"""

import json
from collections.abc import Sequence
from datetime import datetime
from typing import Any

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from rewardserve.errors import LoadFailed
from rewardserve.types import Message, content_of

# What a template raises: by its own decision, or because it cannot work on these messages. jinja's filters raise what
# Python does, a macro that calls itself RecursionError (a RuntimeError), a text that is doubled too often MemoryError.
TEMPLATE_ERRORS = (
    *(jinja2.TemplateError, TypeError, ValueError, ArithmeticError, LookupError),
    *(AttributeError, RuntimeError, MemoryError),
)


class _Generation(Extension):
    """`{% generation %}` marks the assistant's words for training; rendering passes them through."""

    tags = {"generation"}  # noqa: RUF012  jinja2's own declaration

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        return jinja2.nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


class ChatTemplate:
    def __init__(self, source: str, special_tokens: dict[str, str], in_parts: bool = False) -> None:
        """Raises LoadFailed for a source that is no template."""
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise_exception
        try:
            self._template = environment.from_string(source)
        except (SyntaxError, *TEMPLATE_ERRORS) as error:  # Python's, of loops in one another more than it takes
            reason = " ".join(error.msg.split() if isinstance(error, SyntaxError) else str(error).split())
            line = f"line {error.lineno}: " if isinstance(error, jinja2.TemplateSyntaxError) else ""
            raise LoadFailed(f"the checkpoint's chat template is none: {line}{reason}") from error
        self._special_tokens = special_tokens
        self._in_parts = in_parts

    def render(self, messages: Sequence[Message], add_generation_prompt: bool, now: datetime | None = None) -> str:
        """Raises one of TEMPLATE_ERRORS for conversations the template refuses (an unknown role, two user turns, ...).

        `now` is the time of day for templates that ask.
        """
        text = self._template.render(
            messages=[{"role": m.role, "content": content_of(m.content, self._in_parts)} for m in messages],
            add_generation_prompt=add_generation_prompt,
            tools=None,
            documents=None,
            strftime_now=lambda pattern: (now or datetime.now()).strftime(pattern),
            **self._special_tokens,
        )
        try:
            text.encode()
        except UnicodeEncodeError as error:  # before a tokenizer takes it for no string at all
            raise jinja2.TemplateError(f"it renders {text[error.start]!r}, half a character") from error
        return text
