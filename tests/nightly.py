"""Which tests wait for `make nightly`, because `make test` sees each kind of failure without them.

A test that is marked so is made for all its parameters, and `make test` leaves some of them out
(conftest.py). It is not made for fewer, because pytest orders tests by the place of a parameter:
tests of one model would not be beside each other, and the model would be made again and again.
"""

from collections.abc import Collection, Mapping
from typing import Any

import pytest

from configs import ONE_OF_EACH_FAMILY, ONE_OF_EACH_KIND
from stock import BACKENDS

# What tests that are `one_of_each_kind` run over, if not over all configs.
FAMILIES_AND_KINDS = list(dict.fromkeys([*ONE_OF_EACH_FAMILY, *ONE_OF_EACH_KIND]))


# What differs most between backends: a plain one, experts, states.
_ON_ALL_BACKENDS = ("llama_grouped", "qwen3_moe_some_dense", "lfm2_wide_kernel")


def is_its_turn(position: int, place: int, places: int) -> bool:
    """Whether the item at a position of a list takes this of some places: one after another."""
    return position % places == place


def _has_its_backend(parameters: Mapping[str, Any]) -> bool:
    name, place = parameters["pair"], BACKENDS.index(parameters["backend"])
    if name not in ONE_OF_EACH_KIND or name in _ON_ALL_BACKENDS:
        return name in _ON_ALL_BACKENDS
    return is_its_turn(ONE_OF_EACH_KIND.index(name), place, len(BACKENDS))


def _only(names: Collection[str]) -> pytest.MarkDecorator:
    """Returns the mark of a test that `make test` makes for the models of these names."""

    def is_one(parameters: Mapping[str, Any]) -> bool:
        return any(isinstance(x, str) and x in names for x in parameters.values())

    return pytest.mark.nightly(unless=is_one)


# What parts do, not families: `make test` takes one model of each kind, `make nightly` all.
one_of_each_kind = _only(ONE_OF_EACH_KIND)
# What a family's tables say: `make test` takes one model of each family, and of each kind.
one_of_each_family = _only(FAMILIES_AND_KINDS)
# What differs with how tokens see others: with caches, masks and positions, not with tensors.
_SEEING = (
    "llama_grouped",
    "gemma2_soft_caps",
    "gpt2_tied",
    "phi3_long_texts",
    "bloom_five_heads",
    "gpt_oss_clamped",
    "deepseek_v3_groups",
    "llama4_chunks_then_all",
    "lfm2_wide_kernel",
    "qwen3_5_grouped_values",
    "gemma4_shared_keys",
    "mamba2_groups",
)
one_of_each_way_of_seeing = _only(_SEEING)
# What hardly differs with parts: norms, rings, biases, experts, states.
_FEW = (
    "llama_grouped",
    "gemma2_soft_caps",
    "gpt2_tied",
    "qwen3_moe_some_dense",
    "lfm2_wide_kernel",
)
one_of_a_few = _only(_FEW)
# How matrices lie in files and in layers: alone, as (in, out), fused in two ways, of experts in two
# ways, of latents, beside a state.
LAYOUTS = (
    "qwen2_tied",
    "gpt2_tied",
    "gpt_neox_no_biases_tied",
    "phi3_long_texts",
    "qwen3_moe_some_dense",
    "gpt_oss_clamped",
    "deepseek_v3_groups",
    "lfm2_wide_kernel",
)
one_of_each_layout = _only(LAYOUTS)
# For what test_peft_experts.py sees of experts.
_EXPERTS = ("qwen3_moe_some_dense", "gpt_oss_clamped", "deepseek_v3_groups")
one_of_each_layout_without_experts = _only([name for name in LAYOUTS if name not in _EXPERTS])
# What a file holds is the same for all backends: one model of each kind, which take the backends in
# turn.
one_backend_each = pytest.mark.nightly(unless=_has_its_backend)


def waits_for_the_night(item: pytest.Item) -> bool:
    """Whether a test is one that `make test` leaves out."""
    mark = item.get_closest_marker("nightly")
    if mark is None:
        return False
    return not ("unless" in mark.kwargs and mark.kwargs["unless"](item.callspec.params))  # type: ignore[attr-defined]


def is_night(config: pytest.Config) -> bool:
    """Whether the run is one of all tests."""
    return "nightly" in config.option.markexpr
