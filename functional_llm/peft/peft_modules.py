"""A module of PEFT's as the adapters of the layers that it is here: of one, or of several fused.

Shapes: R rank; E experts, before the others where there are some.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from functional_llm.graph.types import JSON
from functional_llm.peft.adapter import REVERSED, Adapter
from functional_llm.peft.dora import DoRA, column_lengths
from functional_llm.peft.ia3 import IA3
from functional_llm.peft.lora import LoRA
from functional_llm.peft.names import NamedModel, to_numpy
from functional_llm.peft.peft_experts import factors_to_peft

FACTORS = ("lora_A.weight", "lora_B.weight")
EMBEDDING_FACTORS = ("lora_embedding_A", "lora_embedding_B")
CONVERT = "save it with PEFT's `path_initial_model_for_weight_conversion`"


@dataclass(frozen=True)
class SavedAdapter:
    """One layer's adapter in a file: how to make it, and its weights by the adapter's own names."""

    cls: type[Adapter]
    options: JSON
    weights: dict[str, np.ndarray]

    def at(self, path: str) -> tuple[str, "SavedAdapter"]:
        """Returns the path of the layer, and the adapter of it, or of the head that it is."""
        layer = path.removesuffix(REVERSED)
        if layer == path:
            return path, self
        return layer, SavedAdapter(self.cls, {**self.options, "reverse": True}, self.weights)


@dataclass(frozen=True)
class ModuleTensors:
    """What a file has for one module: tensors by PEFT's suffixes, and scale and rank of LoRA."""

    tensors: dict[str, np.ndarray]
    scale: float = 1.0
    rank: int = 0


def join_adapters(
    adapters: Sequence[Adapter | None], paths: list[str], module: str, model: NamedModel
) -> ModuleTensors:
    """Makes one adapter for the outputs of several layers side by side (or of one)."""
    present: list[Any] = [x for x in adapters if x is not None]
    if isinstance(present[0], IA3):
        return ModuleTensors({"ia3_l": _join_ia3(adapters, paths, module, model)})
    scale = present[0].scale
    factors = [None if x is None else [to_numpy(f) for f in x.factors()] for x in adapters]
    a = np.concatenate([f[0] for f in factors if f is not None], axis=-1)
    *stack, _, rank = a.shape
    sizes = [1] if len(paths) == 1 else [model.linear(path).out_size for path in paths]
    blocks, row = [], 0
    for adapter, pair, size in zip(adapters, factors, sizes, strict=True):
        if pair is None or adapter is None:
            blocks.append(np.zeros((*stack, rank, size), "float32"))
            continue
        b = pair[1] * (adapter.scale / scale)
        blocks.append(np.zeros((*stack, rank, b.shape[-1]), "float32"))
        blocks[-1][..., row : row + b.shape[-2], :] = b
        row += b.shape[-2]
    b = model.join_outputs(module, blocks)
    if stack:
        return ModuleTensors(factors_to_peft(a, b, module, model), scale, rank)
    names = EMBEDDING_FACTORS if present[0].linear.takes_integers else FACTORS
    tensors = dict(zip(names, (a.T, b.T), strict=True))
    if isinstance(present[0], DoRA):
        lengths = [
            column_lengths(model.linear(path).kernel()) if x is None else x.magnitude
            for path, x in zip(paths, adapters, strict=True)
        ]
        tensors["lora_magnitude_vector"] = model.join_outputs(
            module, [to_numpy(x) for x in lengths]
        )
    return ModuleTensors(tensors, scale, rank)


def _join_ia3(
    adapters: Sequence[Adapter | None], paths: list[str], module: str, model: NamedModel
) -> np.ndarray:
    present = [x for x in adapters if x is not None]
    if not any(x.scales_inputs for x in present):
        scales = [
            np.ones(model.linear(path).out_size, "float32") if x is None else to_numpy(x.scale)
            for path, x in zip(paths, adapters, strict=True)
        ]
        return model.join_outputs(module, scales)[:, None]
    if len(paths) > 1:
        raise ValueError(
            f"PEFT's files keep {paths} as one module, whose inputs cannot be scaled one by one. "
            "Leave them out of `feedforward`."
        )
    return to_numpy(present[0].scale)[None, :]


def split_adapter(
    whole: SavedAdapter, module: str, paths: Sequence[str], model: NamedModel
) -> list[tuple[str, SavedAdapter]]:
    """Returns path and adapter of the layers that one fused module stands for (or of one)."""
    if len(paths) == 1:
        return [(paths[0], whole)]
    sizes = [model.linear(path).out_size for path in paths]
    if (init := whole.options.get("init", "zeros")) != "zeros":
        raise ValueError(
            f"init_lora_weights = {init!r} was taken from a matrix that is {len(sizes)} layers "
            f"here; {CONVERT}"
        )
    shared = "scale" if whole.options.get("scales_inputs") else "lora_a"
    pieces: list[dict[str, np.ndarray]] = [{} for _ in sizes]
    for name, array in whole.weights.items():
        if name != shared and array.shape[-1] != sum(sizes):
            raise ValueError(f"'{name}' expected {sum(sizes)} outputs, received {array.shape[-1]}")
        is_shared = name == shared
        arrays = [array] * len(sizes) if is_shared else model.split_outputs(module, array, sizes)
        for piece, part in zip(pieces, arrays, strict=True):
            piece[name] = np.ascontiguousarray(part)
    ranks = _used_ranks(pieces) if whole.cls is LoRA else [None] * len(pieces)
    return [
        (path, SavedAdapter(whole.cls, *_with_ranks(whole.options, piece, used)))
        for path, piece, used in zip(paths, pieces, ranks, strict=True)
        if used is None or used.any()
    ]


def _used_ranks(pieces: Sequence[Mapping[str, np.ndarray]]) -> Sequence[np.ndarray | None]:
    """Returns which ranks each piece has for itself, because no other piece alone uses them.

    Otherwise ranks would add up whenever a fused module is saved and loaded.
    """
    if any(set(piece) != {"lora_a", "lora_b"} for piece in pieces):
        return [None] * len(pieces)
    used = [(b != 0).any((*range(b.ndim - 2), -1)) for b in (x["lora_b"] for x in pieces)]
    return [own | ~np.any(used, axis=0) for own in used]


def _with_ranks(
    options: JSON, piece: dict[str, np.ndarray], ranks: np.ndarray | None
) -> tuple[JSON, dict[str, np.ndarray]]:
    """Returns options and weights of a piece with some of its ranks; its scale stays."""
    if ranks is None or ranks.all():
        return options, piece
    share = ranks.sum() / len(ranks)
    alpha = options["alpha"] * float(share**0.5 if options["rslora"] else share)
    weights = {"lora_a": piece["lora_a"][..., ranks], "lora_b": piece["lora_b"][..., ranks, :]}
    return {**options, "rank": int(ranks.sum()), "alpha": alpha}, weights
