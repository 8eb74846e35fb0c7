"""Chat templates: a list of messages -> the text in the format of the model's training.

A template is a program from a checkpoint, so it runs in Jinja's sandbox, on plain data.

Reference: https://huggingface.co/docs/transformers/chat_templating
"""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox


class ChatTemplate:
    """A compiled chat template.

    Args:
        source: The template, in Jinja.

    Raises:
        ValueError: If the template is not valid Jinja.
    """

    def __init__(self, source: str) -> None:
        if not isinstance(source, str):
            raise ValueError(
                "The chat template is not a valid Jinja template. Expected: a string. Received: "
                f"{source!r:.100}."
            )
        self.source = source
        try:
            self._template = _make_environment().from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise ValueError(
                "The chat template is not a valid Jinja template. Expected: Jinja as in a Hugging "
                f"Face chat_template. Received: a template with an error in line {error.lineno}: "
                f"{error.message} Correct it, or pass the prompt as text instead of messages."
            ) from error

    def render(self, messages: Sequence[Mapping[str, Any]], **variables: Any) -> str:
        """Renders a conversation.

        Args:
            messages: Dicts with "role" and "content", the oldest first. An assistant's message
                may have "tool_calls" in place of "content".
            variables: Other variables of the template: `add_generation_prompt`, `bos_token`,
                `tools`, ...

        Returns:
            The text, with the special tokens that the template writes.

        Raises:
            ValueError: If `messages` has another form, a value is not plain data, or the template
                does not accept the conversation.
        """
        check_messages(messages)
        values = _as_plain_data({"tools": None, "documents": None, **variables})
        values["messages"] = _as_plain_data(list(messages))
        try:
            return self._template.render(values)
        # A template is foreign code and may raise anything.
        except Exception as error:
            raise ValueError(
                "The chat template did not accept the conversation. It raised "
                f"{type(error).__name__}: {error}. Received: {len(messages)} messages with the "
                f"roles {[message['role'] for message in messages]}. Change the messages as the "
                "error says, or pass the variables that the template needs."
            ) from error


def check_messages(messages: object) -> None:
    """Raises an error unless `messages` is a conversation.

    Args:
        messages: Should be a non-empty list of dicts with "role" and "content" (or "tool_calls").

    Raises:
        ValueError: If it is not.
    """
    expected = (
        'Expected: a non-empty list of messages such as {"role": "user", "content": "Hello"}. '
    )
    if not isinstance(messages, Sequence) or isinstance(messages, str | bytes) or not messages:
        received = "an empty list" if messages == [] else f"{type(messages).__name__}: {messages!r}"
        raise ValueError(
            f"`messages` is not a conversation. {expected}Received: {received:.200}. "
            "Wrap a single message in a list; one call renders one conversation."
        )
    for index, message in enumerate(messages):
        if (
            not isinstance(message, Mapping)
            or not isinstance(message.get("role"), str)
            or not ("content" in message or "tool_calls" in message)
        ):
            raise ValueError(
                f"`messages[{index}]` is not a message. {expected}Received: {message!r:.200}. "
                'Give every message a "role" (a string) and a "content".'
            )


class _GenerationBlock(jinja2.ext.Extension):
    """`{% generation %}`: marks the assistant's text for training; renders as its content."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)


def _make_environment() -> jinja2.Environment:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_GenerationBlock, jinja2.ext.loopcontrols],
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


# Jinja's own tojson escapes HTML and sorts keys; models were trained on plain JSON.
def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def _as_plain_data(value: Any) -> Any:
    # A round trip through JSON: methods of other objects could lead out of the sandbox.
    try:
        return json.loads(json.dumps(value))
    except (TypeError, ValueError) as error:
        raise ValueError(
            "A chat template reads plain data only. Expected: strings, numbers, lists and dicts. "
            f"Received: a value of another type ({error}). Pass tools as JSON schemas, and images "
            "as URLs."
        ) from error
