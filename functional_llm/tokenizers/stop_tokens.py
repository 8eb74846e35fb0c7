"""Which tokens end a turn."""

from collections.abc import Iterable

from functional_llm.tokenizers.engines import Engine

# The names of tokens that end a turn, in all models. Many files name only one of theirs as `eos`.
END_OF_TURN = frozenset(
    "<|eot_id|> <|im_end|> <|end|> <|return|> <|call|> <|flush|> <|calls|> <end_of_turn> <eos> "
    "<|endoftext|> <|eom_id|> <EOT> _<EOT> [EOT] [EOS] <|end_of_text|> <end_of_utterance> <turn|> "
    "<|tool_response> <｜end▁of▁sentence｜> [e~[ <|rwkv_tokenizer_end_of_text|>".split()
)


def stop_token_ids(engine: Engine, known: Iterable[int | None]) -> frozenset[int]:
    """Returns the known ids, and those of special tokens whose names are in `END_OF_TURN`."""
    ids = {token: engine.token_id(token) for token in END_OF_TURN}
    named = {token: i for token, i in ids.items() if i in engine.special_ids}
    # In vocabularies with these pairs, "<|end|>" ends a message, not the turn.
    if {"<|return|>", "<|call|>"} <= named.keys() or {"<|flush|>", "<|calls|>"} <= named.keys():
        named.pop("<|end|>", None)
    return frozenset(i for i in (*named.values(), *known) if i is not None)
