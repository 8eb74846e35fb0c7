"""Tokens that text is split at, as one regular expression."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import tokenizers

from functional_llm.tokenizers.in_graph.refusal import refuse


@dataclass(frozen=True)
class Splitting:
    """Tokens that text is split at.

    Args:
        pattern: An expression for RE2 that finds the longest of them; empty if there are none.
        ids: Their texts and ids; -1 for one that is found but stays text.
        eats_before: The texts of those that take the whitespace before them.
        eats_after: Those that take the whitespace behind them.
    """

    pattern: str
    ids: Mapping[str, int]
    eats_before: frozenset[str]
    eats_after: frozenset[str]


def make_splitting(
    tokens: Iterable[tuple[str, tokenizers.AddedToken, int]], parse_special: bool
) -> Splitting:
    """Returns how text is split at tokens.

    Args:
        tokens: The text to look for, the token, and its id.
        parse_special: Whether special tokens are taken out of the text where they are found.
    """
    ids: dict[str, int] = {}
    before, after = set(), set()
    for text, token, token_id in tokens:
        if not text:
            continue
        if token.single_word:
            raise refuse(f"the added token {text!r}, which is read only where it is a whole word")
        if text in ids:
            raise refuse(f"two added tokens that are both read as {text!r}")
        ids[text] = token_id if parse_special or not token.special else -1
        before |= {text} if token.lstrip else set()
        after |= {text} if token.rstrip else set()
    return Splitting(_any_of(ids), ids, frozenset(before), frozenset(after))


def _any_of(texts: Iterable[str]) -> str:
    """Returns an expression that finds the longest of some texts: each beginning stands once."""
    tree: dict[str, Any] = {}
    for text in texts:
        node = tree
        for character in text:
            node = node.setdefault(character, {})
        node[""] = {}
    return _write(tree) if tree else ""


def _write(tree: dict[str, Any]) -> str:
    written = ""
    while True:  # a chain without a choice
        if len(tree) == 1 and "" not in tree:
            ((character, tree),) = tree.items()
            written += rf"\x{{{ord(character):x}}}"
            continue
        break
    branches = [rf"\x{{{ord(x):x}}}{_write(inner)}" for x, inner in tree.items() if x]
    if branches:
        written += f"(?:{'|'.join(branches)}){'?' if '' in tree else ''}"
    return written
