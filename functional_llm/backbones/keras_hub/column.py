"""How KerasHub describes the models of a family: one more column of the family's table.

A weight has the place that it has in a `.weights.h5` file of KerasHub, which is also the way to it
in a model in memory: the kind of its layer with a number, attributes from there on, and the number
of the variable: `layers/llama_transformer_decoder_1/_self_attention_layer/_query_dense/vars/0`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from functional_llm.backbones.transforms import Row, Rows, Transform, split_axis
from functional_llm.blocks.rope_scaling import LinearScaling, RopeScaling
from functional_llm.graph.types import JSON

REQUIRED = object()  # the default of an argument that must be there
HEAD = "layers/reversible_embedding/vars/1"  # of its own, if there is one


def _nothing_wrong(_: Any) -> Sequence[str]:
    return ()


def _nothing_written(_: Any) -> JSON:
    return {}


def _nothing_computed(_: Any) -> Mapping[str, np.ndarray]:
    return {}


@dataclass(frozen=True, kw_only=True)
class KerasHub:
    """How KerasHub describes the models of a family.

    An argument that has the name of a field of our config is that field. What has no equal on the
    other side goes through `fields` and `written`, or has its default; whoever reads or writes
    checks that the way back leads to where it began, so that nothing is dropped.

    Args:
        classes: Names of the backbone classes that are such models. We make the first.
        arguments: Argument of the class -> its default, or `REQUIRED`.
        renamed: Argument that is a field of our config under another name -> the field.
        fields: All arguments -> the fields of our config that are no argument, or another number.
        written: Config -> the arguments that are no field, or another number.
        weights: Config -> rows (place of a weight, path of our variable, transform); `{}` stands
            for the layer.
        wrong: Config -> what KerasHub's class computes otherwise than the model's authors.
        always_wrong: What it computes otherwise whatever the numbers are.
        wrong_text: Config -> what its `generate` computes otherwise than the class.
        ignored: Arguments without a meaning for the models that can be read, or all of whose
            values `fields` reads.
        types: Types of arguments that are no field, or one of another type, where they are not just
            a number.
        computed: Config -> value of weights that follow from the arguments, by their place.
        encoders: Argument with an encoder of images or sounds -> places of all that it brings
            along. Of such a model, the text model is read; it is written without encoders.
    """

    classes: Sequence[str]
    arguments: Mapping[str, Any]
    renamed: Mapping[str, str] = field(default_factory=dict)
    fields: Callable[[JSON], JSON]
    written: Callable[[Any], JSON] = _nothing_written
    weights: Callable[[Any], Rows]
    wrong: Callable[[Any], Sequence[str]] = _nothing_wrong
    always_wrong: Sequence[str] = ()
    wrong_text: Callable[[Any], Sequence[str]] = _nothing_wrong
    ignored: Sequence[str] = ()
    types: Mapping[str, Any] = field(default_factory=dict)
    computed: Callable[[Any], Mapping[str, np.ndarray]] = _nothing_computed
    encoders: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def differences(self, config: Any) -> list[str]:
        """Returns what KerasHub computes otherwise than the authors of such a model."""
        return [*self.always_wrong, *self.wrong(config)]

    def given_fields(self, arguments: JSON) -> JSON:
        """Returns the fields that arguments are, beside those of their own name."""
        renamed = {field: arguments[name] for name, field in self.renamed.items()}
        return renamed | self.fields(arguments)

    def made_arguments(self, config: Any) -> JSON:
        """Returns the arguments for such a model: fields, what `written` says, or defaults."""
        own = {
            name: getattr(config, self.renamed.get(name, name), None if x is REQUIRED else x)
            for name, x in self.arguments.items()
        }
        return own | self.written(config)

    def encoder_places(self, arguments: JSON) -> list[str]:
        """Returns the places of the encoders that a model with these arguments has."""
        return [x for name, places in self.encoders.items() if arguments.get(name) for x in places]


SIZES = "vocabulary_size num_layers hidden_dim intermediate_dim".split()
OURS = "decoder_{}"  # a layer of ours
EMBEDDING = ("layers/reversible_embedding/vars/0", "token_embedding/embeddings", "same")


def window_fields(arguments: JSON, slides: Sequence[bool]) -> JSON:
    """Returns the types of the layers, and the window.

    Args:
        arguments: All arguments of the class.
        slides: Whether each layer has the window.
    """
    kinds = ("sliding_attention" if x else "full_attention" for x in slides)
    return {"layer_types": tuple(kinds), "sliding_window": arguments["sliding_window_size"]}


def has_window(config: Any) -> bool:
    """Returns whether any layer has the window."""
    return "sliding_attention" in config.layer_types


def divided(factor: float) -> RopeScaling | None:
    """Returns the scaling that KerasHub's factor on positions is."""
    return None if factor == 1 else LinearScaling(factor=factor)


def factor(scaling: RopeScaling | None) -> float:
    """Returns KerasHub's factor on positions; 1 for a scaling that is more than that."""
    return scaling.factor if isinstance(scaling, LinearScaling) else 1.0


def one(place: str, path: str) -> Row:
    """Returns the row of a layer with one weight that is here as it is there."""
    return f"{place}/vars/0", path, "same"


def dense(
    place: str, path: str, kernel: str | Transform = "same", bias: str | Transform = "same"
) -> list[Row]:
    """Returns the rows of a Dense or EinsumDense."""
    return [
        (f"{place}/vars/0", f"{path}/kernel", kernel),
        (f"{place}/vars/1", f"{path}/bias", bias),
    ]


def layer_norm(place: str, path: str) -> list[Row]:
    """Returns the rows of a LayerNormalization."""
    return [
        (f"{place}/vars/0", f"{path}/gamma", "same"),
        (f"{place}/vars/1", f"{path}/beta", "same"),
    ]


def attention(
    places: str, queries: int, keys: int, size: int, output: Transform | None = None
) -> list[Row]:
    """Returns the rows of an attention of EinsumDense layers.

    Args:
        places: Of its layers, with `%s` for "query", "key", "value" and "output".
        queries: Number of query heads.
        keys: Number of key and value heads.
        size: Of a head.
        output: Transform of the kernel of the last; (heads, size, out) becomes (in, out).
    """
    path = f"{OURS}/attention/"
    counts = {"query": queries, "key": keys, "value": keys}
    return [
        *(
            row
            for part, count in counts.items()
            for row in dense(
                places % part,
                path + part,
                split_axis(1, (count, size)),
                split_axis(0, (count, size)),
            )
        ),
        *dense(places % "output", f"{path}output", output or split_axis(0, (queries, size))),
    ]
