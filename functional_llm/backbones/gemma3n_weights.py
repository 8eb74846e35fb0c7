"""The weight tables of a Gemma 3n, some of whose tensors depend on the number of streams."""

from typing import Any

from functional_llm.backbones import gemma2, qwen3
from functional_llm.backbones.family import dense_rows
from functional_llm.backbones.sharing import PER_LAYER_ROWS, unused_tensors
from functional_llm.backbones.transforms import Rows, Transform

_LAYER, _DECODER = "model.layers.{}", "decoder_{}"
_SCALE = f"{_DECODER}/altup_scale/scale"
LAYER_ROWS: Rows = [
    *gemma2.WEIGHTS,
    *qwen3.QK_NORMS,
    *PER_LAYER_ROWS,
    *dense_rows(f"{_LAYER}.altup.modality_router", f"{_DECODER}/altup_router"),
    *dense_rows(f"{_LAYER}.altup.prediction_coefs", f"{_DECODER}/altup_prediction"),
    *dense_rows(f"{_LAYER}.altup.correction_coefs", f"{_DECODER}/altup_correction"),
    (f"{_LAYER}.altup.router_norm.weight", f"{_DECODER}/altup_norm/scale", "same"),
    (f"{_LAYER}.altup.correct_output_scale", _SCALE, "same"),
    *dense_rows(f"{_LAYER}.laurel.linear_left", f"{_DECODER}/laurel/left"),
    *dense_rows(f"{_LAYER}.laurel.linear_right", f"{_DECODER}/laurel/right"),
    (f"{_LAYER}.laurel.post_laurel_norm.weight", f"{_DECODER}/laurel/norm/scale", "same"),
]
_STREAMS = {
    "model.altup_projections": "altup_projection",
    "model.altup_unembed_projections": "altup_unembedding",
}


def weights(config: Any) -> Rows:
    """Returns the weight table."""
    return [
        *LAYER_ROWS,
        *(
            row
            for source, target in _STREAMS.items()
            for i in range(config.streams - 1)
            for row in dense_rows(f"{source}.{i}", f"{target}_{i}")
        ),
    ]


def ignored(config: Any) -> list[str]:
    """Returns the patterns of tensors that the model does not need."""
    unused = unused_tensors(config.layer_types, config.borrowing_layers)
    return unused if config.scales_stream else [*unused, "*altup*correct_*scale*"]


def gguf_rows(config: Any) -> Rows:
    """Returns the rows of what GGUF files hold in one tensor, or under another name."""
    of_one = Transform(lambda x: x[0].T, lambda x: x.T[None], axis=0)
    names = {"altup_projection": "altup_proj", "altup_unembedding": "altup_unembd_proj"}
    return [
        ("blk.{}.altup_correct_scale.weight", _SCALE, "same"),
        *(
            (f"{source}.weight", f"{target}_{i}/kernel", of_one)
            for target, source in names.items()
            for i in range(config.streams - 1)
        ),
    ]
