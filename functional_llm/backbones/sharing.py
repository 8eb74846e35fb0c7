"""What Gemma 3n and Gemma 4 have: layers that borrow keys and values, embeddings for each layer."""

from collections.abc import Sequence

from functional_llm.backbones.transforms import Rows
from functional_llm.graph.types import JSON


def lenders(kinds: Sequence[str], borrowing: int) -> dict[int, int]:
    """Returns the number of each layer that borrows -> that of the layer that lends to it.

    Args:
        kinds: The type of each layer.
        borrowing: How many of the last layers borrow: from the last other layer of their type.
    """
    first = len(kinds) - borrowing
    last = {kind: i for i, kind in enumerate(kinds[:first])}
    return {i: last[kinds[i]] for i in range(first, len(kinds))}


def check_sharing(keys: JSON) -> None:
    """Checks that each type of layers has one that lends, as Transformers does.

    Raises:
        ValueError: If one has none.
    """
    kinds, borrowing = keys["layer_types"], keys["num_kv_shared_layers"]
    first = len(kinds) - borrowing
    if borrowing and (borrowing < 0 or set(kinds[: max(0, first)]) != set(kinds)):
        raise ValueError(
            "config.json: expected a num_kv_shared_layers that leaves, before the layers that use "
            f"the keys and values of others, one of each type in layer_types. Received: {borrowing}"
            f" of {len(kinds)} layers, {', '.join(sorted(set(kinds)))}."
        )


def borrowed_tensors(kinds: Sequence[str], borrowing: int) -> list[str]:
    """Returns patterns of the tensors that checkpoints hold for layers that borrow, unused."""
    return [
        f"model.layers.{i}.self_attn.{part}.weight"
        for i in lenders(kinds, borrowing)
        for part in ("k_proj", "v_proj", "k_norm", "v_norm")
    ]


_LAYER, _OWN = "model.layers.{}", "decoder_{}/per_layer"
PER_LAYER_ROWS: Rows = [
    ("model.embed_tokens_per_layer.weight", "per_layer_embedding/embeddings", "same"),
    ("model.per_layer_model_projection.weight", "per_layer_projection/kernel", "transpose"),
    ("model.per_layer_projection_norm.weight", "per_layer_norm/scale", "same"),
    (f"{_LAYER}.per_layer_input_gate.weight", f"{_OWN}/gate/kernel", "transpose"),
    (f"{_LAYER}.per_layer_projection.weight", f"{_OWN}/projection/kernel", "transpose"),
    (f"{_LAYER}.post_per_layer_input_norm.weight", f"{_OWN}_post_norm/scale", "same"),
]
