"""Which tokens end a turn."""

from collections.abc import Iterable

from functional_llm.tokenizers.engines import Engine

# Tokens that end a turn under every name that models gave them. Many files name only one `eos`.
END_OF_TURN = frozenset(
    "<|eot_id|> <|im_end|> <|end|> <|return|> <|call|> <|flush|> <|calls|> <end_of_turn> <eos> "
    "<|endoftext|> <|eom_id|> <EOT> _<EOT> [EOT] [EOS] <|end_of_text|> <end_of_utterance> <turn|> "
    "<|tool_response> <｜end▁of▁sentence｜> [e~[".split()
)


def stop_token_ids(engine: Engine, known: Iterable[int | None]) -> frozenset[int]:
    """The ids that end a turn: known ones, and special tokens whose name says so."""
    ids = {token: engine.token_id(token) for token in END_OF_TURN}
    named = {token: i for token, i in ids.items() if i in engine.special_ids}
    # Beside these, "<|end|>" ends one message of several.
    if {"<|return|>", "<|call|>"} <= named.keys() or {"<|flush|>", "<|calls|>"} <= named.keys():
        named.pop("<|end|>", None)
    return frozenset(i for i in (*named.values(), *known) if i is not None)
