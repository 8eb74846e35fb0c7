"""Which tokens of a conversation are learnt: the assistant's answers.

A template that marks them with `{% generation %}` says it itself. Of another one, an answer begins
after the text of what was before, generation prompt included, and ends where the text up to it
ends.
"""

from collections.abc import Sequence
from itertools import takewhile

import numpy as np

from functional_llm.tokenizers import RenderedChat, TextTokenizer
from functional_llm.training.conversations import Conversation


def find_answers(
    conversation: Conversation, tokenizer: TextTokenizer
) -> tuple[list[int], np.ndarray, str]:
    """Returns a conversation's ids, and which of them are learnt.

    Args:
        conversation: The messages.
        tokenizer: The model's tokenizer, with a chat template.

    Returns:
        The ids; (n,) bool, whether the model learns to predict this one; and why other answers are
        not learnt, `""` if all are.

    Raises:
        ValueError: If the chat template does not accept the conversation, or of no answer it is
            certain where it begins and ends. The message names the record.
    """
    try:
        whole = _render(conversation, tokenizer, len(conversation.messages), False)
        marks = _learnt_marks(conversation, tokenizer, whole)
    except ValueError as error:
        raise ValueError(f"{conversation.where}: {error}") from error
    ids, offsets = tokenizer.encode_with_offsets(whole.text, tokenizer.add_bos, parse_special=True)
    is_target = np.zeros(len(ids), bool)
    doubts = []
    if marks is not None:
        for start, end in marks:
            is_target |= [first < end and last > start for first, last in offsets]
        if not marks:
            doubts.append("no mark stands in this conversation")
    else:
        for turn, message in enumerate(conversation.messages):
            if turn >= conversation.num_given and message["role"] == "assistant":
                found = _find_turn(conversation, tokenizer, turn, whole.text, ids)
                if isinstance(found, str):
                    doubts.append(f"of message {turn + 1}, {found}")
                else:
                    is_target[slice(*found)] = True
    is_target[:1] = False
    if doubts and not is_target.any():
        raise ValueError(
            f"{conversation.where}: the chat template does not show where the answer begins. "
            "Expected: a template that marks answers with {% generation %}; or a conversation that "
            "begins with the text of its question and generation prompt. Received: a template of "
            f"which {doubts[-1]}. Give the tokenizer another template, with "
            "`dataclasses.replace(tokenizer, chat_template=...)`, or use a `text` column that "
            "holds the conversation as the model is to see it."
        )
    return ids, is_target, "; ".join(doubts)


def _render(
    conversation: Conversation, tokenizer: TextTokenizer, count: int, adds_prompt: bool
) -> RenderedChat:
    messages = conversation.messages[:count]
    return tokenizer.render_chat(messages, adds_prompt, **conversation.variables)


def _learnt_marks(
    conversation: Conversation, tokenizer: TextTokenizer, whole: RenderedChat
) -> list[tuple[int, int]] | None:
    """Returns start and end of the marked places behind what is given; `None` without marks."""
    if whole.answers is None:
        return None
    given = conversation.num_given
    roles = [message["role"] for message in conversation.messages[:given]]
    begin = 0
    if "assistant" in roles:
        begin = _common(_render(conversation, tokenizer, given, False).text, whole.text)
    return [span for span in whole.answers if span[0] >= begin]


def _find_turn(
    conversation: Conversation, tokenizer: TextTokenizer, turn: int, text: str, ids: list[int]
) -> tuple[int, int] | str:
    """Returns start and end of an answer in the ids, or why they are uncertain."""
    try:
        before = _question(conversation, tokenizer, turn, text)
        through = _render(conversation, tokenizer, turn + 1, False).text
    except ValueError as error:
        return f"the conversation up to it cannot be written ({error!s:.200})"
    if not text.startswith(before):
        place = _common(text, before)
        return (
            f"the text before it ends in {before[place:][-60:]!r} when the answer is asked for, "
            f"and goes on with {text[place : place + 60]!r} when it is there"
        )
    # By common prefixes: a token may reach over the border between question and answer.
    start = _common(ids, _encode(before, tokenizer))
    through_ids = _encode(through, tokenizer)
    end = _common(ids, through_ids)
    stop_ids = tokenizer.stop_token_ids
    stops = [i for i in range(start, len(through_ids)) if through_ids[i] in stop_ids]
    # A model never generates what a template writes after the end of a turn.
    needed = stops[-1] + 1 if stops else len(through_ids)
    if end >= needed or (not stops and text.startswith(through)):
        return start, min(end, needed)
    place = _common(text, through)
    return (
        f"the answer is written as {through[place : place + 60]!r} at the end of a conversation, "
        f"and as {text[place : place + 60]!r} when messages follow"
    )


def _question(conversation: Conversation, tokenizer: TextTokenizer, turn: int, text: str) -> str:
    """Returns the text before an answer, what asks for it included.

    Before an answer that comes first there is what the template writes by itself: a system prompt,
    say, and what asks for any answer.

    Raises:
        ValueError: If the template does not show it.
    """
    if turn:
        return _render(conversation, tokenizer, turn, True).text
    asked = _render(conversation, tokenizer, len(conversation.messages), True).text
    prompt = asked[len(text) :] if asked.startswith(text) else ""
    place = text.find(prompt) if prompt else -1
    if place < 0:
        raise ValueError("the template does not show where an answer that comes first begins")
    return text[: place + len(prompt)]


def _encode(text: str, tokenizer: TextTokenizer) -> list[int]:
    return tokenizer.encode(text, tokenizer.add_bos, parse_special=True)


def _common(first: Sequence[object], second: Sequence[object]) -> int:
    """Returns the length of the common beginning."""
    pairs = zip(first, second, strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
