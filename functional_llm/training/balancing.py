"""Balance among experts: a loss that is high where a router sends all tokens to a few of them.

Shapes: B batch, T tokens, E experts, k experts chosen for a token.
"""

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import keras
from keras import ops

from functional_llm.graph.capturing import capture
from functional_llm.graph.freezing import keep_frozen
from functional_llm.graph.keras_private import calls, make_functional
from functional_llm.graph.selection import inner_graph, inner_layers, walk
from functional_llm.graph.types import JSON, Nested, Tensor
from functional_llm.layers.experts import ExpertDispatch, ExpertScores

ModelT = TypeVar("ModelT", bound=keras.Model)


def balance_experts(model: ModelT, coefficient: float = 0.001) -> ModelT:
    """Returns a model that adds to its loss, in training, how unevenly experts are chosen.

    ```python
    balanced = flm.training.balance_experts(backbone)
    balanced.compile("adamw")
    balanced.fit(token_ids)  # trains the backbone, whose weights it shares
    ```

    Args:
        model: A model with the inputs and outputs of a Backbone, and with experts. It stays as it
            is, and its weights are shared.
        coefficient: Factor on `balance_loss`.

    Raises:
        ValueError: If there are no experts, or the layers choose different numbers of them.
    """
    kinds = set(_choices(model))
    if len(kinds) != 1:
        found = sorted(kinds) or "a model without experts"
        raise ValueError(
            "Expected layers that choose as many experts each, of as many. Received (chosen, all): "
            f"{found}."
        )
    ((num_chosen, _),) = kinds
    captured = capture(model, lambda layer, path: isinstance(layer, ExpertScores))
    inputs, outputs = captured.input, dict(captured.output)
    logits = list(outputs.pop("captured").values())
    balance = ExpertBalance(num_chosen, coefficient, name="expert_balance")
    hidden = outputs["hidden"]
    balanced = balance({"x": hidden, "logits": logits, "positions": inputs["positions"]})
    head = keras.Model(hidden, outputs["logits"])
    tensors = {id(head.inputs[0]): balanced}
    for call in calls(head):
        args, kwargs = call.with_tensors(tensors)
        new = keras.tree.flatten(call.operation(*args, **kwargs))
        tensors |= {id(old): x for old, x in zip(call.outputs, new, strict=True)}
    outputs |= {"hidden": balanced, "logits": tensors[id(head.outputs[0])]}
    new_model = make_functional(type(model), inputs, outputs, name=model.name)
    for name in ("config", "preset"):
        setattr(new_model, name, getattr(model, name, None))
    keep_frozen(model, new_model, None)
    return new_model


def _choices(model: keras.Model) -> list[tuple[int, int]]:
    """Returns of each layer with experts how many a token takes, and of how many."""
    graphs = [model, *(x for _, x in walk(model, composites=True))]
    return [
        (call.args[0]["experts"].shape[-1], call.operation.num_experts)
        for graph in graphs
        if inner_layers(graph) is not None
        for call in calls(inner_graph(graph))
        if isinstance(call.operation, ExpertDispatch)
    ]


@keras.saving.register_keras_serializable("functional_llm")
class ExpertBalance(keras.layers.Layer):
    """Returns what it gets, and adds to the loss in training how unevenly experts are chosen.

    Args:
        num_chosen: k.
        coefficient: Factor on `balance_loss`.
    """

    def __init__(self, num_chosen: int, coefficient: float, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.num_chosen = num_chosen
        self.coefficient = coefficient

    def call(self, inputs: Mapping[str, Nested], training: bool | None = None) -> Tensor:
        """Adds the loss.

        Args:
            inputs: `x`, any tensor; `logits`, (B, T, E) of each router; `positions` (B, T), -1 for
                padding.
            training: Whether the loss is added.

        Returns:
            `x`.
        """
        if training:
            loss = balance_loss(inputs["logits"], inputs["positions"] >= 0, self.num_chosen)
            self.add_loss(self.coefficient * loss)
        return inputs["x"]

    def compute_output_spec(
        self, inputs: Mapping[str, Nested], training: bool | None = None
    ) -> keras.KerasTensor:
        return keras.KerasTensor(inputs["x"].shape, inputs["x"].dtype)

    def get_config(self) -> JSON:
        own = {"num_chosen": self.num_chosen, "coefficient": self.coefficient}
        return {**super().get_config(), **own}


def balance_loss(logits: Sequence[Tensor], is_token_BT: Tensor, num_chosen: int) -> Tensor:
    """Returns E times the sum over experts of their share of choices and their mean probability.

    Both are means over the tokens of all layers, padding excluded. It is k if all are chosen
    equally often.

    Args:
        logits: (B, T, E) of each layer's router.
        is_token_BT: Booleans, `False` for padding.
        num_chosen: k.

    Reference:
        [Switch Transformers](https://arxiv.org/abs/2101.03961), equations 4 to 6; over all layers
        and with k choices as in Transformers, `load_balancing_loss_func`.
    """
    is_token_BT1 = ops.expand_dims(ops.cast(is_token_BT, "float32"), 2)
    num_experts = logits[0].shape[-1]
    chosen_E, probable_E = 0.0, 0.0
    for logits_BTE in logits:
        probabilities_BTE = ops.softmax(ops.cast(logits_BTE, "float32"), axis=-1)
        _, experts_BTk = ops.top_k(probabilities_BTE, num_chosen)
        counts_BTE = ops.sum(ops.one_hot(experts_BTk, num_experts, dtype="float32"), axis=2)
        chosen_E = chosen_E + ops.sum(counts_BTE * is_token_BT1, axis=(0, 1))
        probable_E = probable_E + ops.sum(probabilities_BTE * is_token_BT1, axis=(0, 1))
    count = ops.maximum(ops.sum(is_token_BT1) * len(logits), 1.0)
    return num_experts * ops.sum(chosen_E / count * (probable_E / count))
