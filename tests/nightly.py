"""Which tests wait for `make nightly`, because `make test` sees each kind of failure without them.

A test that is marked so is made for all its parameters, and `make test` leaves some of them out
(conftest.py). It is not made for fewer, because pytest orders tests by the place of a parameter:
tests of one model would not be beside each other, and the model would be made again and again.
"""

from collections.abc import Mapping
from typing import Any

import pytest

from configs import ONE_OF_EACH_FAMILY, ONE_OF_EACH_KIND
from stock import BACKENDS

# What tests that are `one_of_each_kind` run over, if not over all configs.
FAMILIES_AND_KINDS = list(dict.fromkeys([*ONE_OF_EACH_FAMILY, *ONE_OF_EACH_KIND]))


def backend_in_turn(name: str) -> str:
    """Returns the backend that the config of a family takes in `make test`: one after another."""
    return BACKENDS[ONE_OF_EACH_FAMILY.index(name) % len(BACKENDS)]


def _is_of_a_kind(parameters: Mapping[str, Any]) -> bool:
    return any(isinstance(x, str) and x in ONE_OF_EACH_KIND for x in parameters.values())


def _has_its_backend(parameters: Mapping[str, Any]) -> bool:
    name = parameters["pair"]
    return name in ONE_OF_EACH_FAMILY and parameters["backend"] == backend_in_turn(name)


# What parts do, not families: `make test` takes one model of each kind, `make nightly` all.
one_of_each_kind = pytest.mark.nightly(unless=_is_of_a_kind)
# What a file holds is the same for all backends: `make test` takes all three for one of each kind,
# one for one of each family.
one_backend_each = pytest.mark.nightly(unless=lambda x: _is_of_a_kind(x) or _has_its_backend(x))


def waits_for_the_night(item: pytest.Item) -> bool:
    """Whether a test is one that `make test` leaves out."""
    mark = item.get_closest_marker("nightly")
    if mark is None:
        return False
    return not ("unless" in mark.kwargs and mark.kwargs["unless"](item.callspec.params))  # type: ignore[attr-defined]


def is_night(config: pytest.Config) -> bool:
    """Whether the run is one of all tests."""
    return "nightly" in config.option.markexpr
