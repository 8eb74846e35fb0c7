"""Family: what the file of a family says of its models, as one value; what many families share."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from functional_llm.backbones.keras_hub.column import KerasHub
from functional_llm.backbones.transforms import Row, Rows, Transform, fused
from functional_llm.backbones.wrapper import Wrapper
from functional_llm.blocks.language_model import Graph
from functional_llm.blocks.rope_scaling import RopeScaling
from functional_llm.graph.types import JSON


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The numbers that every model has. The file of a family adds its own."""

    vocabulary_size: int
    num_layers: int
    hidden_dim: int
    intermediate_dim: int
    layer_norm_epsilon: float
    max_sequence_length: int
    activation: str
    tie_word_embeddings: bool


@dataclass(frozen=True, kw_only=True)
class MultiHeadConfig(ModelConfig):
    """The numbers of a model whose heads all have keys of their own, and share the width."""

    num_heads: int

    @property
    def num_key_value_heads(self) -> int:
        """How many heads have keys: all."""
        return self.num_heads

    @property
    def head_dim(self) -> int:
        """The width of a head."""
        return self.hidden_dim // self.num_heads


@dataclass(frozen=True, kw_only=True)
class RotaryConfig(ModelConfig):
    """The numbers of a model with RoPE."""

    num_query_heads: int
    rope_max_wavelength: float
    rope_scaling: RopeScaling | None


@dataclass(frozen=True, kw_only=True)
class DecoderConfig(RotaryConfig):
    """The numbers of a model with grouped queries and RoPE: most families have all of them."""

    num_key_value_heads: int
    head_dim: int

    @property
    def rotary_dim(self) -> int:
        """How many channels of a head turn: all."""
        return self.head_dim


@dataclass(frozen=True, kw_only=True)
class PartialRotaryConfig(DecoderConfig):
    """The numbers of a model with RoPE on the first channels of each head only."""

    partial_rotary_factor: float

    @property
    def rotary_dim(self) -> int:
        """How many channels of a head turn."""
        return int(self.head_dim * self.partial_rotary_factor)


AnyConfig = TypeVar("AnyConfig", bound=DecoderConfig)  # the same one throughout a signature


def _nothing(_: Any) -> JSON:
    return {}


def _no_rows(_: Any) -> Rows:
    return ()


_GATE_AND_UP, _ = fused()


def expert_parameters(
    experts: str = "mlp.experts",
    router: str = "mlp.gate",
    gate_up: str | Transform = _GATE_AND_UP,
    down: str | Transform = "transpose",
) -> Rows:
    """Rows of the experts and routers in Transformers' model, as most families have them.

    Args:
        experts: The module of the experts, with `gate_up_proj` and `down_proj`.
        router: The module of the router.
        gate_up: Of the parameter that is gate and up.
        down: Of the other.
    """
    layer, target = "model.layers.{}", "decoder_{}/mlp"
    return (
        (f"{layer}.{experts}.gate_up_proj", f"{target}/experts_gate/kernel", gate_up),
        (f"{layer}.{experts}.gate_up_proj", f"{target}/experts_up/kernel", gate_up),
        (f"{layer}.{experts}.down_proj", f"{target}/experts_down/kernel", down),
        (f"{layer}.{router}.weight", f"{target}/router/kernel", "transpose"),
    )


@dataclass(frozen=True, kw_only=True)
class Family:
    """A family of models.

    Args:
        model_type: Its name in the `config.json` of a checkpoint.
        other_model_types: Names there that mean the same.
        architecture: The class of Transformers that loads such a checkpoint.
        models: The published models, in words.
        real_weights: Those of them whose real weights the tests run, beside tiny random ones.
        config_class: The family's own frozen dataclass with a model's numbers.
        build: Config -> inputs and outputs of the graph.
        config_keys: Key of a `config.json` -> field of the config, or the type of a key that only
            `complete_keys` reads. RoPE's keys are known to the reader.
        config_aliases: Another name of a key -> the key.
        config_given: Keys of a `config.json` -> the same, in the form that other files have.
        config_nulls: Keys that `complete_keys` gets as `None` where a file says null, because null
            means something else there than that the key is absent.
        config_ignored: Key that Transformers does not read -> the key that it reads instead. They
            may not say different things.
        complete_keys: Given keys -> all keys, with the values that absent and outdated keys mean,
            and the fields that no key gives.
        layer_types: The words in a config's `layer_types`: what most layers of a family with one
            type are, and the other type, of layers that see a window or keep a state.
        config_constants: Key -> the one value for which the graph is right.
        written_keys: Config -> what Transformers needs in a `config.json` beside `config_keys`.
        rope_types: RoPE's types in files of the family -> what they mean here, where that is not
            what they mean elsewhere; if there are any, files may have no other types.
        weights: Rows (tensor of a checkpoint, path of a variable, a transform or its name); `{}`
            stands for the layer. Rows that name one tensor are its parts, in order. A name such as
            `experts[.{expert}].up_proj.weight` is many tensors, one for each entry of a variable.
            Or a function of the config that returns them.
        parameters: Rows of what is a parameter in Transformers' model, and not the weight of a
            Linear: experts and routers, under the names that they have there, which need not be
            those in checkpoints. Those of one module in its order. PEFT's adapters name them. Or a
            function of the config that returns them.
        inputs_first: Whether Transformers' class of experts says `is_transposed`.
        ignored: Patterns of tensors that checkpoints carry and that the model does not need. Or a
            function of the config that returns them.
        wrappers: Checkpoints of several models that may hold one of this family.
        base_prefix: Prefix that the names of tensors lack in checkpoints of the bare model.
        stored_prefixes: What names of tensors begin with in checkpoints -> what they begin with in
            `weights`, which has the names of Transformers' modules.
        stored_parts: Other parts of names in checkpoints -> what they are in `weights`.
        gguf_architecture: Its name in GGUF files; `None` if they have none of their own.
        other_gguf_architectures: Names there that mean the same.
        gguf_told_by: Key of a GGUF file, without the architecture, which tells this family from
            the others whose files have the same architecture; `None` if no key does. Or a pair of
            a key and its value.
        gguf_given: Keys of a GGUF file, without the architecture -> the same, where they do not
            mean what they mean elsewhere.
        gguf_keys: Key of a GGUF file, without the architecture -> key of a `config.json`, beside
            those of a Llama.
        gguf_ignored: Keys of a GGUF file, without the architecture, of which the family has no
            choice.
        gguf_defaults: Given keys -> what a GGUF file does not say.
        gguf_permuted: Projection whose rows llama.cpp reorders -> field with their number of heads.
        gguf_transposed: Patterns of tensors that GGUF files hold transposed.
        gguf_offset: Patterns of tensors that GGUF files hold with one added.
        gguf_rows: Config -> rows of variables that GGUF files hold in other tensors than
            checkpoints do, or as other numbers; with the names in GGUF files. Of rows for one
            variable, those count whose tensors are there.
        gguf_values: Keys of a GGUF file that have a number for each layer: tensors of one number
            to `gguf_rows`, named by the key and the layer.
        keras_hub: How KerasHub describes such models; `None` if it has none.
    """

    model_type: str
    other_model_types: Sequence[str] = ()
    architecture: str
    models: str
    real_weights: str = ""
    config_class: type[ModelConfig]
    build: Callable[[Any], Graph]
    config_keys: Mapping[str, str | type]
    config_aliases: Mapping[str, str] = field(default_factory=dict)
    config_given: Callable[[JSON], JSON] = dict
    config_nulls: Sequence[str] = ("num_key_value_heads",)
    config_ignored: Mapping[str, str] = field(default_factory=dict)
    layer_types: Sequence[str] = ("full_attention", "sliding_attention")
    complete_keys: Callable[[JSON], JSON]
    config_constants: Mapping[str, Any] = field(default_factory=dict)
    written_keys: Callable[[Any], JSON] = _nothing
    rope_types: Mapping[str, str] = field(default_factory=dict)
    weights: Rows | Callable[[Any], Rows]
    parameters: Rows | Callable[[Any], Rows] = expert_parameters()
    inputs_first: bool = False
    ignored: Sequence[str] | Callable[[Any], Sequence[str]] = ()
    wrappers: Sequence[Wrapper] = ()
    base_prefix: str = "model."
    stored_prefixes: Mapping[str, str] = field(default_factory=dict)
    stored_parts: Mapping[str, str] = field(default_factory=dict)
    gguf_architecture: str | None = None
    other_gguf_architectures: Sequence[str] = ()
    gguf_told_by: str | tuple[str, Any] | None = None
    gguf_given: Callable[[JSON], JSON] = dict
    gguf_keys: Mapping[str, str] = field(default_factory=dict)
    gguf_ignored: Sequence[str] = ()
    gguf_defaults: Callable[[JSON], JSON] = _nothing
    gguf_permuted: Mapping[str, str] = field(default_factory=dict)
    gguf_transposed: Sequence[str] = ()
    gguf_offset: Sequence[str] = ()
    gguf_rows: Callable[[Any], Rows] = _no_rows
    gguf_values: Sequence[str] = ()
    keras_hub: KerasHub | None = None

    def rows(self, config: ModelConfig) -> Rows:
        """Returns the weight table of a model with these numbers."""
        return self.weights(config) if callable(self.weights) else self.weights

    def parameter_rows(self, config: ModelConfig) -> Rows:
        """Returns the rows of what are parameters of a model with these numbers."""
        return self.parameters(config) if callable(self.parameters) else self.parameters

    def ignored_tensors(self, config: ModelConfig) -> Sequence[str]:
        """Returns the patterns of tensors that a model with these numbers does not need."""
        return self.ignored(config) if callable(self.ignored) else self.ignored


def dense_rows(
    source: str,
    target: str,
    kernel: str | Transform = "transpose",
    bias: str | Transform = "same",
) -> list[Row]:
    """Rows of a Dense: its kernel, which PyTorch's Linear stores transposed, and its bias."""
    return [
        (f"{source}.weight", f"{target}/kernel", kernel),
        (f"{source}.bias", f"{target}/bias", bias),
    ]


def all_dense_rows(source: str, target: str, names: Mapping[str, str]) -> list[Row]:
    """Rows of several Dense of one module.

    Args:
        source: The module in a checkpoint.
        target: The layer that it is here.
        names: Name of a Linear there -> that of its Dense here.
    """
    rows = (dense_rows(f"{source}.{x}", f"{target}/{ours}") for x, ours in names.items())
    return [row for of_one in rows for row in of_one]


def attention_rows(source: str, output: str = "o_proj") -> list[Row]:
    """Rows of an attention, as most checkpoints have them; `output` is the last Linear's name."""
    names = {"q_proj": "query", "k_proj": "key", "v_proj": "value", output: "output"}
    return all_dense_rows(source, "decoder_{}/attention", names)


# Of an MLP, for `all_dense_rows`, as most checkpoints have it.
GATED_MLP = {f"{x}_proj": x for x in ("gate", "up", "down")}
PLAIN_MLP = {f"{x}_proj": x for x in ("up", "down")}


def gguf_expert_rows() -> list[Row]:
    """Rows of experts as llama.cpp's converter writes them, whatever tensors they come from."""
    names = {theirs: f"experts_{x}" for theirs, x in GATED_MLP.items()}
    return all_dense_rows("model.layers.{}.mlp.experts", "decoder_{}/mlp", names)


def fused_rows(source: str, target: str, groups: int = 1) -> list[Row]:
    """Rows of a Linear that is the Dense layers of an attention's queries, keys and values in one.

    Args:
        source: The Linear.
        target: The attention.
        groups: As for `fused`.
    """
    parts = [f"{target}/{part}" for part in ("query", "key", "value")]
    return [row for part in parts for row in dense_rows(source, part, *fused(groups))]


def layer_norm_rows(source: str, target: str) -> list[Row]:
    """Rows of a LayerNormalization."""
    return [
        (f"{source}.weight", f"{target}/gamma", "same"),
        (f"{source}.bias", f"{target}/beta", "same"),
    ]


# Buffers with frequencies and angles that checkpoints of some versions of Transformers hold.
ROPE_BUFFERS = ("*rotary_emb*inv_freq", "*rotary_emb.cos_cached", "*rotary_emb.sin_cached")

# What most families call the fields of `DecoderConfig` in a `config.json`, those of RoPE aside.
COMMON_KEYS: dict[str, str | type] = {
    "vocab_size": "vocabulary_size",
    "num_hidden_layers": "num_layers",
    "hidden_size": "hidden_dim",
    "intermediate_size": "intermediate_dim",
    "num_attention_heads": "num_query_heads",
    "num_key_value_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "rms_norm_eps": "layer_norm_epsilon",
    "max_position_embeddings": "max_sequence_length",
    "hidden_act": "activation",
    "tie_word_embeddings": "tie_word_embeddings",
}


def renamed_keys(**names: str) -> dict[str, str | type]:
    """Returns `COMMON_KEYS` with other names for some of them."""
    return {names.get(key, key): field for key, field in COMMON_KEYS.items()}


def complete_common_keys(keys: JSON) -> JSON:
    """Adds Transformers' defaults for keys of most families that a `config.json` leaves out."""
    num_heads = keys["num_attention_heads"]
    if keys.get("num_key_value_heads") is None:
        keys = {**keys, "num_key_value_heads": num_heads}
    if keys.get("head_dim", 0) is None:
        keys = {key: value for key, value in keys.items() if key != "head_dim"}
    return {
        "head_dim": keys["hidden_size"] // num_heads,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
        "hidden_act": "silu",
        "rope_theta": 10000.0,
        **keys,
    }


def with_divided_heads(keys: JSON) -> JSON:
    """Adds a head size, the width divided by the heads, where a file says none, or null."""
    divided = keys["hidden_size"] // keys["num_attention_heads"]
    return keys | {"head_dim": divided if keys.get("head_dim") is None else keys["head_dim"]}


def check_windows(kinds: Sequence[str], window: int | None) -> None:
    """Checks that there is a window if there are layers that have one.

    Raises:
        ValueError: If there is none.
    """
    if window is None and "sliding_attention" in kinds:
        raise ValueError(
            "config.json: expected a sliding_window that is in use for layer_types with "
            "sliding_attention, received none."
        )


def check_chosen(
    count: int | None,
    experts: int | None,
    key: str = "num_local_experts",
    chosen_key: str = "num_experts_per_tok",
) -> None:
    """Checks that there are as many experts as are chosen for a token; the keys have the numbers.

    Raises:
        ValueError: If there are fewer, or none are chosen.
    """
    if count is None or experts is None or not 1 <= count <= experts:
        raise ValueError(
            f"config.json: expected {chosen_key} from 1 to {key}. Received: {count} and {experts}."
        )


def check_given(keys: JSON, names: Sequence[str]) -> None:
    """Checks that keys are not null of which Transformers makes no model then.

    Raises:
        ValueError: Naming those that are.
    """
    nulls = [name for name in names if keys.get(name) is None]
    if nulls:
        raise ValueError(f"config.json: expected numbers for {nulls}. Received: null.")


def check_head_bias(keys: JSON, key: str) -> None:
    """Checks that a head with a bias is one of its own; `key` says whether there is one.

    Raises:
        ValueError: If the head is the embedding.
    """
    if keys[key] and keys["tie_word_embeddings"]:
        raise ValueError(
            f"config.json: expected tie_word_embeddings to be false where {key} is true: no part "
            "here is a tied head with a bias."
        )
