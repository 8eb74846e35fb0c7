"""What families with Mamba-2 layers share: numbers, the layers, and the names of their weights."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from keras import ops

from functional_llm.backbones.family import ModelConfig, check_given, dense_rows
from functional_llm.backbones.transforms import Row, Rows, axis_removed, split_axis
from functional_llm.blocks.attention import PartFunction, Shapes, key_value_shapes
from functional_llm.blocks.language_model import LayerType, StateType
from functional_llm.blocks.mamba2 import StateSizes, gated_norm, mamba2, mamba2_shapes
from functional_llm.graph.composite import CompositeLayer
from functional_llm.graph.types import JSON


@dataclass(frozen=True, kw_only=True)
class SpaceConfig(ModelConfig):
    """The numbers of Mamba-2 layers. Steps have no upper bound where it is `None`."""

    num_state_heads: int
    state_head_dim: int
    num_state_groups: int
    state_dim: int
    convolution_width: int
    convolution_bias: bool
    least_step: float
    most_step: float | None

    @property
    def state_sizes(self) -> StateSizes:
        """The sizes of a Mamba-2 layer."""
        return StateSizes(
            num_heads=self.num_state_heads,
            head_dim=self.state_head_dim,
            num_groups=self.num_state_groups,
            state_dim=self.state_dim,
            width=self.convolution_width,
        )

    @property
    def steps(self) -> tuple[float, float | None]:
        """The least and the largest step."""
        return self.least_step, self.most_step


@dataclass(frozen=True, kw_only=True)
class HybridConfig(SpaceConfig):
    """The numbers of a model with Mamba-2 layers and attention."""

    num_key_value_heads: int
    head_dim: int
    state_bias: bool


def hybrid_types(
    config: HybridConfig, attends: LayerType
) -> dict[str, tuple[LayerType | StateType, Shapes]]:
    """Returns the types of layers for `build_of_types`; `attends` is that of attention."""
    kept = key_value_shapes(config.num_key_value_heads, config.head_dim)
    return {
        "full_attention": (attends, kept),
        "linear_attention": (StateType(), mamba2_shapes(config.state_sizes)),
    }


def build_states(config: SpaceConfig, bias: bool, **others: Any) -> CompositeLayer:
    """Returns a Mamba-2 layer.

    Args:
        config: The numbers of the model.
        bias: Whether the first projection and the last add biases.
        **others: Arguments of `mamba2`, also in place of what follows from the numbers.
    """
    own: dict[str, Any] = {
        "gate": gated_norm(config.layer_norm_epsilon, config.num_state_groups),
        "steps": config.steps,
        "input_bias": bias,
        "convolution_bias": config.convolution_bias,
        "output_bias": bias,
    }
    return mamba2(config.state_sizes, config.hidden_dim, **(own | others))


def read_steps(keys: JSON) -> JSON:
    """Returns the fields that `time_step_limit` means: absent, it is from zero on.

    Raises:
        ValueError: If it is anything but two numbers from zero on, the first no larger.
    """
    limit = keys.get("time_step_limit", [0.0, math.inf])
    # As Transformers writes what JSON has no number for.
    limits = limit if isinstance(limit, list | tuple) else ()
    said = [x.get("__float__") if isinstance(x, dict) else x for x in limits]
    bounds: list[Any] = [math.inf if x in ("Infinity", "inf") else x for x in said]
    if (
        len(bounds) != 2
        or not all(type(x) in (int, float) and (0 <= x <= 1e9 or x == math.inf) for x in bounds)
        or bounds != sorted(bounds)
    ):
        raise ValueError(
            "config.json: expected a time_step_limit of two numbers from 0 to 1e9 or infinity, the "
            f"smaller first, received {limit!r:.200}."
        )
    least, most = map(float, bounds)
    return {"least_step": least, "most_step": None if most == math.inf else most}


def written_steps(config: SpaceConfig) -> JSON:
    """Returns the key that says which steps there are, unless they are all that there can be."""
    if config.steps == (0.0, None):
        return {}
    most = math.inf if config.most_step is None else config.most_step
    return {"time_step_limit": [config.least_step, most]}


def residual_parts(in_float32: bool) -> list[PartFunction]:
    """Returns what stands behind the embedding and each branch: sums of them are in float32."""
    return [lambda x, inputs: ops.cast(x, "float32")] if in_float32 else []


def check_heads(keys: JSON, heads: str, groups: str, whole: int, size: int) -> None:
    """Checks that heads share out the inner width and the groups.

    Args:
        keys: Of a `config.json`.
        heads: The key with the number of heads.
        groups: The key with the number of groups.
        whole: The inner width that other keys mean.
        size: Of a head.

    Raises:
        ValueError: If they do not.
    """
    count = keys[heads]
    if count * size != whole or keys[groups] < 1 or count % keys[groups]:
        raise ValueError(
            f"config.json: expected {heads} heads that share an inner width of {whole}, and are a "
            f"multiple of {groups}. Received {count} heads of {size}, and {keys[groups]} groups."
        )


_MIXER = "decoder_{}/mamba"


def mixer_rows(source: str) -> list[Row]:
    """Rows of a Mamba-2 layer's weights; `source` is its module."""
    return [
        *dense_rows(f"{source}.in_proj", f"{_MIXER}/input"),
        (f"{source}.conv1d.weight", f"{_MIXER}/convolution/kernel", "depthwise"),
        (f"{source}.conv1d.bias", f"{_MIXER}/convolution/bias", "same"),
        (f"{source}.dt_bias", f"{_MIXER}/state_space/dt_bias", "same"),
        (f"{source}.A_log", f"{_MIXER}/state_space/a_log", "same"),
        (f"{source}.D", f"{_MIXER}/state_space/d", "same"),
        (f"{source}.norm.weight", f"{_MIXER}/norm/scale", "same"),
        *dense_rows(f"{source}.out_proj", f"{_MIXER}/output"),
    ]


def gguf_mixer_rows(source: str) -> Callable[[SpaceConfig], Rows]:
    """Returns what llama.cpp's files hold otherwise than checkpoints; `source` is the module."""

    def rows(config: SpaceConfig) -> Rows:
        groups = config.num_state_groups
        sizes = (groups, config.state_sizes.inner_dim // groups)
        return [
            (f"{source}.conv1d.weight", f"{_MIXER}/convolution/kernel", "transpose"),
            (f"{source}.dt_proj.bias", f"{_MIXER}/state_space/dt_bias", "same"),
            (f"{source}.A_log", f"{_MIXER}/state_space/a_log", "log_of_negatives"),
            (f"{source}.D", f"{_MIXER}/state_space/d", axis_removed(1)),
            (f"{source}.norm.weight", f"{_MIXER}/norm/scale", split_axis(0, sizes)),
        ]

    return rows


def gguf_given(given: JSON) -> JSON:
    """Returns a GGUF file's keys with the size of a head, and the quotient of widths."""
    inner = given["ssm.inner_size"]
    return {key: x for key, x in given.items() if key != "ssm.inner_size"} | {
        "ssm.head_size": inner // given["ssm.time_step_rank"],
        "ssm.expand": inner // given["embedding_length"],
    }


# Keys of a GGUF file, after `gguf_given`.
GGUF_KEYS = {
    "ssm.conv_kernel": "conv_kernel",
    "ssm.state_size": "state_size",
    "ssm.time_step_rank": "num_heads",
    "ssm.group_count": "n_groups",
    "ssm.head_size": "head_dim",
    "ssm.expand": "expand",
}

# Of models that have attention, too; those that are the same in several families.
PREFIXED_KEYS: dict[str, str | type] = {
    "mamba_n_heads": "num_state_heads",
    "mamba_n_groups": "num_state_groups",
    "mamba_d_state": "state_dim",
    "mamba_d_conv": "convolution_width",
    "mamba_conv_bias": "convolution_bias",
    "mamba_expand": int,
    "mamba_d_head": object,
    "mamba_chunk_size": object,
    "time_step_limit": object,
}
PREFIXED_DEFAULTS: JSON = {
    "mamba_n_heads": 128,
    "mamba_n_groups": 1,
    "mamba_d_state": 256,
    "mamba_d_head": "auto",
    "mamba_d_conv": 4,
    "mamba_expand": 2,
    "mamba_conv_bias": True,
}
PREFIXED_GGUF_KEYS = {
    "ssm.conv_kernel": "mamba_d_conv",
    "ssm.state_size": "mamba_d_state",
    "ssm.time_step_rank": "mamba_n_heads",
    "ssm.group_count": "mamba_n_groups",
    "ssm.head_size": "mamba_d_head",
    "ssm.expand": "mamba_expand",
}
PREFIXED_NULLS = ("num_key_value_heads", "time_step_limit", *PREFIXED_DEFAULTS)
# What older files call types of layers.
OLDER_WORDS = {"mamba": "linear_attention", "attention": "full_attention"}


def complete_prefixed(keys: JSON, inner: int) -> JSON:
    """Adds the fields that no key gives by itself, of an inner width."""
    check_given(keys, list(PREFIXED_DEFAULTS))
    size = keys["mamba_d_head"]
    size = inner // keys["mamba_n_heads"] if size == "auto" else size
    check_heads(keys, "mamba_n_heads", "mamba_n_groups", inner, size)
    return {**keys, **read_steps(keys), "state_head_dim": size}


def written_prefixed(config: SpaceConfig) -> JSON:
    """Returns the keys of the size of a head, and of the steps."""
    return {"mamba_d_head": config.state_head_dim, **written_steps(config)}
