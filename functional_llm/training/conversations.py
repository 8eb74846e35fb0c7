"""Records -> conversations: whatever the columns are called, messages and which of them are learnt.

The columns are those that TRL reads, and Alpaca's and ShareGPT's.

Reference: https://huggingface.co/docs/trl/dataset_formats
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from functional_llm.training.records import Record

# The first of these sets of columns that a record has is read.
COLUMNS = (
    ("messages",),
    ("conversations",),
    ("prompt", "completion"),
    ("instruction", "output"),
)
# What ShareGPT calls roles.
_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "function_call": "assistant",
    "observation": "tool",
}

_RESERVED = {"messages", "add_generation_prompt", "continue_final_message"}


@dataclass(frozen=True)
class Conversation:
    """A conversation with answers of the assistant.

    Args:
        where: Its place, for messages.
        messages: The messages, the oldest first.
        num_given: Number of messages at the beginning that are not learnt, whoever wrote them.
        variables: What else the chat template is given, such as `tools`.
    """

    where: str
    messages: list[dict[str, Any]]
    num_given: int
    variables: dict[str, Any]


def is_conversation(record: Record) -> bool:
    """Whether a record has the columns of a conversation."""
    return any(set(needed) <= record.fields.keys() for needed in COLUMNS)


def read_conversation(record: Record) -> Conversation:
    """Returns a record as a conversation.

    Args:
        record: With one of the sets of `COLUMNS`.

    Raises:
        ValueError: If columns are missing, or a value has another type.
    """
    fields = record.fields
    columns = next((x for x in COLUMNS if set(x) <= fields.keys()), None)
    match columns:
        case None:
            raise ValueError(
                f"{record.where} lacks columns. Expected: `messages`; or `conversations`; or "
                "`prompt` and `completion`; or `instruction` and `output` (`input` and `system` if "
                f"there are any); or `text`. Received: {sorted(fields)}. Rename the columns."
            )
        case ("instruction", "output"):
            question = column_text(record, "instruction")
            if fields.get("input"):
                question = f"{question}\n{column_text(record, 'input')}"
            given = [{"role": "user", "content": question}]
            learnt = [{"role": "assistant", "content": column_text(record, "output")}]
        case ("prompt", "completion") if isinstance(fields["prompt"], list):
            given, learnt = _messages(record, "prompt"), _messages(record, "completion")
        case ("prompt", "completion"):
            given = [{"role": "user", "content": column_text(record, "prompt")}]
            learnt = [{"role": "assistant", "content": column_text(record, "completion")}]
        case (column, *_):
            given, learnt = [], _messages(record, column)
    if all(message.get("role") != "assistant" for message in learnt):
        column = "completion" if columns == ("prompt", "completion") else columns[0]
        raise _not_messages(record, column)
    roles = [message.get("role") for message in (*given, *learnt)]
    if fields.get("system") and "system" not in roles:
        given = [{"role": "system", "content": column_text(record, "system")}, *given]
    return Conversation(record.where, [*given, *learnt], len(given), _variables(record))


def column_text(record: Record, column: str) -> str:
    """Returns the text of a column.

    Raises:
        ValueError: If it is something else.
    """
    value = record.fields[column]
    if not isinstance(value, str):
        raise ValueError(
            f"{record.where}: expected a string in column `{column}`, received "
            f"{type(value).__name__}: {value!r:.80}"
        )
    return value


def _messages(record: Record, column: str) -> list[dict[str, Any]]:
    messages = record.fields[column]
    if not isinstance(messages, list) or not all(isinstance(m, Mapping) for m in messages):
        raise _not_messages(record, column)
    return [_as_message(message) for message in messages]


def _as_message(message: Mapping[str, Any]) -> dict[str, Any]:
    given = {key: x for key, x in message.items() if x is not None}  # columns of other messages
    named = {{"from": "role", "value": "content"}.get(key, key): x for key, x in given.items()}
    if "from" in given and isinstance(named["role"], str):
        named["role"] = _ROLES.get(named["role"], named["role"])
    return named


def _not_messages(record: Record, column: str) -> ValueError:
    return ValueError(
        f"{record.where}: expected `{column}` to be a list of objects with `role` and `content` "
        "(or ShareGPT's `from` and `value`), one of the role `assistant`. Received: "
        f"{record.fields[column]!r:.200}"
    )


def _variables(record: Record) -> dict[str, Any]:
    tools, others = record.fields.get("tools"), record.fields.get("chat_template_kwargs") or {}
    if isinstance(tools, str):  # tables cannot hold schemas of different tools otherwise
        try:
            tools = json.loads(tools) if tools.strip() else None
        except ValueError:
            raise ValueError(
                f"{record.where}: expected `tools` to be a list of JSON schemas, or one as JSON. "
                f"Received: {tools!r:.200}"
            ) from None
    if not isinstance(others, dict) or others.keys() & _RESERVED:
        raise ValueError(
            f"{record.where}: expected an object in column `chat_template_kwargs`, with other keys "
            f"than {', '.join(sorted(_RESERVED))}. Received: {others!r:.80}"
        )
    return ({"tools": tools} if tools else {}) | others
