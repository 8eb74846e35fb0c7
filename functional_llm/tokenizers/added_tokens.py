"""Tokens that the files beside a vocabulary add to it, or say more of: as Transformers reads them.

They stand under many names in tokenizer_config.json, special_tokens_map.json and added_tokens.json.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import tokenizers

# The names that Transformers knows, in the order in which it adds these tokens. A file may have
# more, such as "image_token".
_NAMES = tuple(f"{x}_token" for x in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
_LISTS = ("additional_special_tokens", "extra_special_tokens")
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


@dataclass(frozen=True)
class AddedTokens:
    """What the files say of tokens.

    Args:
        named: The texts of special tokens by their names, `"bos_token"` and the like; `None` where
            a file says that there is none.
        described: Tokens that the files describe, in the order of their ids.
        ids: The ids that the files give for tokens.
        special: Special tokens, those with names first.
    """

    named: dict[str, str | None]
    described: list[tokenizers.AddedToken]
    ids: dict[str, int]
    special: list[tokenizers.AddedToken]

    def beside(self, known: Collection[tokenizers.AddedToken]) -> list[tokenizers.AddedToken]:
        """Returns the tokens to add to a vocabulary, in their order.

        Args:
            known: Tokens that it splits text at already. They stay as they are, unless the files
                describe them; but what has a name, such as "pad_token", is special.
        """
        texts = {token.content for token in self.described}
        plain = [x for x in known if x.content in self.named.values() and not x.special]
        tokens = [*self.described, *(x for x in plain if x.content not in texts)]
        seen = texts | {token.content for token in known}
        for token in self.special:
            if token.content not in seen:
                tokens.append(token)
                seen.add(token.content)
        for token in tokens:
            token.special = token.special or token.content in self.named.values()
        return tokens


def read_added_tokens(
    config: Mapping[str, Any], names: Mapping[str, Any], beside: Mapping[str, Any]
) -> AddedTokens:
    """Reads what the files say of tokens.

    Args:
        config: What tokenizer_config.json holds.
        names: What special_tokens_map.json holds.
        beside: What added_tokens.json holds.

    Raises:
        ValueError: If a file is malformed.
    """
    check(all(type(x) is int for x in beside.values()), "added_tokens.json", "ids", beside)
    # The file of names is older than the table, and holds nothing new beside it.
    has_table = "added_tokens_decoder" in config
    facts = {**names, **config} if has_table else {**config, **names}
    values, tokens = _named(facts), _described(config)
    named = {key: _text(key, value) for key, value in values.items()}
    given = [_as_token(value, special=True) for value in values.values() if value is not None]
    special = given + [_as_token(value) for value in _listed(facts)]
    specials = {token.content for token in special}
    for text, token_id in beside.items():
        # Any other may be part of what a model writes for people.
        flags = {"special": text in specials, "normalized": text not in specials}
        if all(token.content != text for token in tokens.values()):
            tokens[token_id] = tokenizers.AddedToken(text, **flags)
    ordered = sorted(tokens.items())
    ids = {token.content: token_id for token_id, token in ordered}
    return AddedTokens(named, [token for _, token in ordered], {**beside, **ids}, special)


def check(is_valid: bool, key: str, expected: str, received: object) -> None:
    """Raises an error that names the key of a file, unless what stands there is valid."""
    if not is_valid:
        raise ValueError(
            f"A file of the tokenizer is malformed. Expected: {expected} under {key!r}. Received: "
            f"{received!r:.200}. Fetch the files again."
        )


def _named(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the special tokens with names, as they stand in the files."""
    named = {key: facts[key] for key in _NAMES if key in facts}
    others = {key: x for key, x in facts.items() if key.endswith("_token") and _is_token(x)}
    named |= {key: x for key, x in others.items() if key not in named}
    extra = facts.get("extra_special_tokens")
    return named | extra if isinstance(extra, dict) else named


def _listed(facts: Mapping[str, Any]) -> list[Any]:
    """Returns the special tokens without names, as they stand in the files."""
    tokens: list[Any] = []
    for key in _LISTS:
        value = facts.get(key) or []
        if not (key == "extra_special_tokens" and isinstance(value, dict)):
            is_list = isinstance(value, list) and all(map(_is_token, value))
            check(is_list, key, "a list of tokens", value)
            tokens += value
    return tokens


def _described(config: Mapping[str, Any]) -> dict[int, tokenizers.AddedToken]:
    key = "added_tokens_decoder"
    table = config.get(key) or {}
    check(isinstance(table, dict), key, "a dict of ids to tokens", table)
    tokens = {}
    for token_id, token in table.items():
        is_valid = isinstance(token, dict) and _is_token(token) and token_id.isdigit()
        check(is_valid, key, "ids and tokens", table)
        tokens[int(token_id)] = tokenizers.AddedToken(token["content"], **_flags(token))
    return tokens


def _as_token(value: Any, **flags: bool) -> tokenizers.AddedToken:
    """Returns a token of a text, which is special, or of an object that describes it."""
    if isinstance(value, str):
        return tokenizers.AddedToken(value, special=True)
    return tokenizers.AddedToken(value["content"], **_flags(value) | flags)


def _flags(token: Mapping[str, Any]) -> dict[str, bool]:
    flags = {name: token[name] for name in _FLAGS if name in token}
    check(all(type(x) is bool for x in flags.values()), token["content"], "true or false", token)
    return flags


def _is_token(value: object) -> bool:
    return isinstance(value.get("content") if isinstance(value, dict) else value, str)


def _text(key: str, value: Any) -> str | None:
    check(value is None or _is_token(value), key, "the text of a token", value)
    return value.get("content") if isinstance(value, dict) else value
