"""The cache of a conversation, which the next turn reuses."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import takewhile

import jax

from functional_llm.layers.cache import (
    Cache,
    can_truncate,
    latest_position,
    states_of,
    truncate_cache,
)


@dataclass
class PromptCache:
    """What a conversation keeps between its turns: the tokens of one row, and their cache.

    Args:
        ids: The tokens so far, prompts and answers.
        cache: The cache that holds them; `None` before the first turn.
        states: The states at the end of the last prompt. States cannot go back: where a turn agrees
            with the prompt before, but not with all of its answer, it goes on from these.
    """

    ids: list[int] = field(default_factory=list)
    cache: Cache | None = None
    states: Cache = field(default_factory=dict)

    def reuse(
        self, row: Sequence[int], turning_lengths: Sequence[int] = ()
    ) -> tuple[int, Cache | None]:
        """Gives up the cache, as far as its tokens agree with those of a new row.

        Args:
            row: The ids of the new turn, earlier turns included.
            turning_lengths: Lengths beyond which the model reads a text in another way: a cache of
                one side is of no use on the other.

        Returns:
            How many of the row's tokens are in the cache, and the cache; `None` if no token is. At
            least one token is left out: the model must be fed one to give logits.
        """
        pairs = zip(self.ids, row[:-1], strict=False)
        known = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        cache, states = self.cache, self.states
        self.ids, self.cache, self.states = list(row), None, {}
        if cache is None:
            return 0, None
        held = int(latest_position(cache)[0]) + 1
        if any((held > length) != (len(row) > length) for length in turning_lengths):
            return 0, None
        kept = int(latest_position(states)[0]) + 1 if states else 0
        candidates = [(known, cache), (kept, {**cache, **states})]
        for length, own in candidates:
            if 0 < length <= known and can_truncate(own, length):
                return length, truncate_cache(own, length)
        return 0, None

    def keep_states(self, cache: Cache) -> None:
        """Takes copies of the states, at the end of the prompt."""
        self.states = jax.tree.map(lambda x: x.copy(), states_of(cache))

    def keep(self, cache: Cache) -> None:
        """Takes the cache back after a turn, unless the turn was interrupted while it was written.

        The last token written is not in the cache yet.
        """
        is_whole = not any(x.is_deleted() for x in jax.tree.leaves(cache))
        self.ids, self.cache = self.ids[:-1], cache if is_whole else None
