"""How the library's own layers are written with stock layers and `keras.ops`."""

import keras
from keras import ops, tree

from functional_llm.graph.own_weights import OwnWeight
from functional_llm.graph.rewiring import shared_copy
from functional_llm.graph.types import Layer, Nested, Tensor
from functional_llm.kernels import Mask
from functional_llm.layers.attention import (
    AttentionDotProduct,
    AttentionMask,
    DescribedMask,
    KVCacheLookup,
)
from functional_llm.layers.convolution import CausalConvolution
from functional_llm.layers.delta_rule import DeltaRule, LogDecay
from functional_llm.layers.experts import (
    ExpertCombine,
    ExpertDense,
    ExpertDispatch,
    ExpertScores,
)
from functional_llm.layers.latent import LatentHeads, LatentPart
from functional_llm.layers.long_texts import IsLongText
from functional_llm.layers.rwkv import StateEvolution, TokenBefore
from functional_llm.layers.selective_scan import SelectiveScan
from functional_llm.layers.state_space import RMSNormOfGroups, StateSpace
from functional_llm.layers.states import PaddingBack, PaddingLast, StateLookup, StatePosition
from functional_llm.stock.lowering import register_lowering


def _lower_lookup(layer: Layer, inputs: dict[str, Nested]) -> tuple[list[Tensor], Nested]:
    """Returns what the queries see: the cache with the new tokens behind it, and the new tokens."""
    new = inputs["new"]
    pairs = zip(tree.flatten(inputs["cache"]), tree.flatten(new), strict=True)
    return [ops.concatenate(pair, axis=1) for pair in pairs], new


def _lower_mask(layer: Layer, inputs: Nested) -> Nested:
    """Returns the mask as one boolean tensor: made once for all layers that share it.

    Beside it are the positions, which slopes need.
    """
    outputs = layer.call(inputs)
    if not isinstance(outputs, dict):
        return outputs
    mask = Mask.from_tensors(outputs)
    positions = (mask.query_positions, mask.slot_positions)
    return Mask(*positions, mask=mask.visible()).to_tensors()


def _lower_product(layer: AttentionDotProduct, inputs: dict[str, Nested]) -> Tensor:
    """Returns the attention in its explicit form."""
    explicit = shared_copy(layer)
    explicit.kernel = "explicit"
    mask = Mask.from_tensors(inputs["mask"])
    if not layer.facts(inputs).has_slopes and mask.mask is not None:
        inputs = {**inputs, "mask": mask.mask}  # in which everything else is, too
    return explicit.call(inputs)


def _lower_dispatch(layer: ExpertDispatch, inputs: dict[str, Nested]) -> dict[str, Nested]:
    """Returns the rows of all experts."""
    outputs = layer.call(inputs)
    return {**outputs, "routing": {**outputs["routing"], "kernel": None}}


def _lower_delta_rule(layer: DeltaRule, inputs: dict[str, Nested]) -> dict[str, Tensor]:
    """Returns what its definition does, which has no loop."""
    explicit = shared_copy(layer)
    explicit.in_chunks = False
    return explicit.call(inputs)


def _lower_padding_last(layer: Layer, inputs: dict[str, Tensor]) -> dict[str, Tensor | None]:
    """Returns the inputs as they are: padding is behind all tokens, or before a row's first."""
    names = ("token_ids", "positions", "segment_ids")
    return {**{name: inputs[name] for name in names}, "places": None}


def _refuse_loop(layer: Layer, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    raise ValueError(
        f"'{layer.name}' goes from token to token in a loop, which has no form in built-in layers: "
        "pairs of tokens would take memory for each channel of each. Expected a model without "
        "states of RWKV or Mamba-1 for a stock file. Save this one with `save_preset`."
    )


register_lowering(AttentionMask, _lower_mask)
register_lowering(DescribedMask, _lower_mask)
register_lowering(AttentionDotProduct, _lower_product)
register_lowering(KVCacheLookup, _lower_lookup)
register_lowering(ExpertScores, keras.layers.Dense)
register_lowering(ExpertDispatch, _lower_dispatch)
register_lowering(ExpertDense, keras.layers.EinsumDense, lambda inputs: inputs["x"])
register_lowering(ExpertCombine, ExpertCombine.call)
register_lowering(LatentHeads, LatentHeads.call)
register_lowering(LatentPart, LatentPart.call)
register_lowering(PaddingLast, _lower_padding_last)
register_lowering(PaddingBack, PaddingBack.call)
register_lowering(StatePosition, StatePosition.call)
register_lowering(StateLookup, StateLookup.call)
register_lowering(CausalConvolution, CausalConvolution.call)
register_lowering(DeltaRule, _lower_delta_rule)
register_lowering(LogDecay, LogDecay.call)
register_lowering(StateEvolution, _refuse_loop)
register_lowering(SelectiveScan, _refuse_loop)
register_lowering(TokenBefore, TokenBefore.call)
register_lowering(StateSpace, StateSpace.as_one_chunk)
register_lowering(RMSNormOfGroups, RMSNormOfGroups.call)
register_lowering(IsLongText, IsLongText.call)
register_lowering(OwnWeight, lambda layer, inputs: layer.variable)
