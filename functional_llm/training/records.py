"""Records: the entries of a dataset, and streams of them that can be read from any place."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

from functional_llm.graph.types import JSON


@dataclass(frozen=True)
class Record:
    """One entry of a dataset.

    Args:
        where: Its place, for messages: `"data.jsonl, line 3"`.
        fields: Column -> value.
    """

    where: str
    fields: JSON


class RecordStream(ABC):
    """Records that are read one at a time, from the beginning or from a place reached before.

    Iterating it reads it from the beginning. A subclass of your own streams whatever else there is.
    """

    name: str
    """What it is called in messages."""

    @abstractmethod
    def read(self, state: JSON | None = None) -> Iterator[tuple[Record, JSON]]:
        """Yields each record with the state after it: plain data, with which `read` goes on.

        Args:
            state: Where to go on; `None` for the beginning.
        """

    @abstractmethod
    def describe(self) -> JSON:
        """Returns, as plain data, what must be the same where a state is to hold."""

    def __iter__(self) -> Iterator[Record]:
        return (record for record, _ in self.read())
