"""Backbone: a language model of any family.

Shapes: B batch, T tokens, S slots, V vocabulary.
"""

import math
from pathlib import Path
from typing import Any, Self

import keras
import numpy as np

from functional_llm.backbones.families import FAMILIES
from functional_llm.backbones.family import Family, ModelConfig
from functional_llm.files.replacing import check_writable
from functional_llm.formats.weight_table import (
    HEAD,
    expand_table,
    module_names,
    shapes_of,
    tied_head,
)
from functional_llm.graph.backend import require_jax
from functional_llm.graph.freezing import Freezable, freeze_variables
from functional_llm.graph.keeping_values import KeepsValues
from functional_llm.graph.keras_private import make_optional
from functional_llm.graph.keras_values import uninitialized
from functional_llm.graph.precision import FullFloat32
from functional_llm.graph.summary import ReadableSummary
from functional_llm.graph.types import JSON, Nested
from functional_llm.layers.call_inputs import as_tensors, complete_inputs, with_mask
from functional_llm.peft.adapter import REVERSED
from functional_llm.peft.adapter_files import load_adapter
from functional_llm.peft.names import Names
from functional_llm.presets.dtypes import dtype_policy
from functional_llm.presets.edits import apply_edits, load_into, quantized
from functional_llm.presets.publishing import Publishable
from functional_llm.presets.sources import (
    adapter_folder,
    base_handle,
    base_name,
    licence_of,
    open_source,
    read_numbers,
)
from functional_llm.stock.exporting import Exportable
from functional_llm.stock.keras_model import load_keras_weights
from functional_llm.training.default_loss import LanguageModelLoss

_REQUIRED = {"token_ids", "positions"}


@keras.saving.register_keras_serializable("functional_llm")
class Backbone(
    Publishable,
    ReadableSummary,
    LanguageModelLoss,
    KeepsValues,
    Freezable,
    FullFloat32,
    Exportable,
    keras.Model,
):
    """A language model as one functional graph, called with as much or as little as there is.

    ```python
    logits_BTV = backbone(token_ids_BT)
    result = backbone({"token_ids": ids, "cache": cache})   # {"logits": ..., "cache": ...}
    ```

    Optional inputs: `positions` (B, T) int32, -1 for padding, by default 0, 1, 2 ... or, with a
    cache, what follows the tokens in it; `attention_mask` (B, T), 0 for padding, from which the
    positions follow; `segment_ids` (B, T) int32, for packed examples; `mask` (B, T, T) boolean,
    False where a token must not see another that it would see, and with a cache (B, T, P), a column
    for each position; `cache` from `make_cache` or from an earlier call.

    `copy.deepcopy` copies all of it. `keras.models.clone_model` makes new weights, and passes on
    neither `config` nor which weights are frozen.

    Args:
        inputs: Symbolic inputs, a dict with all of the above.
        outputs: Symbolic outputs: `logits` (B, T, V), `hidden` (B, T, D), which the head turns
            into logits, and `cache`.
        name: Name of the model.
        config: The family's frozen config that the graph was built from.
    """

    def __init__(
        self,
        inputs: Nested,
        outputs: Nested,
        name: str | None = None,
        *,
        config: ModelConfig | None = None,
        **kwargs: Any,
    ) -> None:
        for key in set(inputs) - _REQUIRED:
            for x in keras.tree.flatten(inputs[key]):
                make_optional(x)
        super().__init__(inputs=inputs, outputs=outputs, name=name, **kwargs)
        self.config: Any = config  # each family has fields of its own
        self.preset: str | None = None  # the handle that the weights came from

    def __reduce__(self) -> tuple[Any, ...]:
        """For `copy.deepcopy` and pickle: Keras's own way knows neither of these."""
        frozen = [v.path for v in self.variables if id(v) in self._frozen]
        compiled = self.get_compile_config()
        optimizer = self.optimizer if compiled else None
        slots = [np.asarray(v) for v in optimizer.variables] if optimizer else []
        self.compiled = False  # the copy is compiled when it is frozen
        try:
            make, arguments = super().__reduce__()
        finally:
            self.compiled = compiled is not None
        return _restored, (make, arguments, self.config, self.preset, frozen, compiled, slots)

    @property
    def input_spec(self) -> None:
        """No spec: `call` completes what is missing."""
        return

    @input_spec.setter
    def input_spec(self, value: object) -> None:
        """Ignored; Keras sets it to None."""

    @property
    def supports_masking(self) -> bool:
        """A mask of the token ids is an attention mask."""
        return True

    @supports_masking.setter
    def supports_masking(self, value: object) -> None:
        """Ignored; Keras sets it to False."""

    def compute_mask(self, inputs: Nested, mask: Nested = None) -> None:
        """The logits have no mask."""
        return

    def __call__(self, inputs: Nested, *args: Any, **kwargs: Any) -> Nested:
        return super().__call__(as_tensors(inputs), *args, **kwargs)

    def call(self, inputs: Nested, training: bool | None = None, mask: Nested = None) -> Nested:
        full = self.complete_inputs(with_mask(inputs, mask))
        outputs = super().call(full, training=training)
        has_cache = isinstance(inputs, dict) and inputs.get("cache") is not None
        names = ["logits", *(["cache"] if has_cache else [])]
        names += [name for name in outputs if name not in ("logits", "hidden", "cache")]
        return {name: outputs[name] for name in names} if len(names) > 1 else outputs["logits"]

    def compute_output_spec(self, inputs: Nested, **kwargs: Any) -> Nested:
        # Functional's own crashes at optional inputs that are None.
        return keras.Operation.compute_output_spec(self, inputs, **kwargs)

    def complete_inputs(self, inputs: Nested) -> dict[str, Nested]:
        """Returns the graph's full dict of inputs: positions filled in, `None` for what is absent.

        Args:
            inputs: Token ids (B, T), or a dict with `token_ids` and any optional inputs.

        Raises:
            ValueError: At an unknown key, a wrong rank, token ids that are no integers or out of
                range, or a cache together with segment ids.
        """
        return complete_inputs(self.input, self.vocabulary_size, inputs)

    @classmethod
    def from_preset(
        cls,
        handle: str | Path,
        dtype: str = "float32",
        load_weights: bool = True,
        quantize: str | None = None,
    ) -> Self:
        """Loads a model: config, graph, and weights streamed straight into `dtype`.

        Args:
            handle: A preset's name, a directory (Hugging Face layout, KerasHub preset), a `.gguf`
                file, a `.keras` file from `save`, `"hf://org/name"` or `"kaggle://..."`; or an
                adapter, which is loaded with the base that it names.
            dtype: `"float32"`, `"bfloat16"` or `"float16"`, or weights in float32 and sums in
                another with `"mixed_bfloat16"` or `"mixed_float16"`.
            load_weights: `False` for random weights; a preset's files are not fetched then.
            quantize: `"int8"` or `"int4"`, as for `flm.quantize`: each tensor is rounded as it is
                read. See docs/quantizing.md for what stays exact.

        Returns:
            A Backbone.

        Raises:
            RuntimeError: With another backend than JAX.
            ValueError: At an unknown preset or family, a config key or tensor that is unknown,
                missing or of a wrong shape, or a damaged file (all differences are named);
                or at what `flm.quantize` refuses.
            FileNotFoundError: If the path has no such files.
        """
        require_jax("Backbone.from_preset")
        if not load_weights:
            family, config, edits = read_numbers(handle)
            backbone = apply_edits(cls._build(family, config, dtype), edits, has_values=True)
            return quantized(backbone, quantize)
        if (folder := adapter_folder(handle)) is not None:
            return load_adapter(
                cls.from_preset(base_handle(folder), dtype, quantize=quantize), folder
            )
        source = open_source(handle)
        with uninitialized():
            backbone = cls._build(source.family, source.config, dtype)
        backbone = apply_edits(backbone, source.edits, has_values=False)
        backbone = load_into(source, backbone, quantize)
        backbone.preset = str(handle)
        return backbone

    def load_weights(self, filepath: str | Path, *args: Any, **kwargs: Any) -> None:
        """Loads weights into this model, one variable after the other.

        Args:
            filepath: A `.keras` file from `save`, or what stock Keras has saved after loading one;
                or a `.weights.h5` file from `save_weights`.
            *args: As for `keras.Model.load_weights`.
            **kwargs: As for `keras.Model.load_weights`.

        Raises:
            ValueError: If the weights are those of another graph.
        """
        if Path(filepath).suffix == ".keras":
            load_keras_weights(Path(filepath), self)
        else:
            super().load_weights(filepath, *args, **kwargs)

    def save_weights(self, filepath: str | Path, *args: Any, **kwargs: Any) -> None:
        """As `keras.Model.save_weights`; on a full disk an OSError, where HDF5 crashes."""
        sizes = (math.prod(v.shape) * np.dtype(v.dtype).itemsize for v in self.variables)
        about_each = 16_384 * len(self.variables)  # what HDF5 writes beside the values
        check_writable(Path(filepath).parent, sum(sizes) + about_each)
        super().save_weights(filepath, *args, **kwargs)

    def _unedited(self, family: Family) -> Self:
        """The family's graph for this config, without values."""
        with uninitialized():
            return self._build(family, self.config, "float32")

    @classmethod
    def _build(cls, family: Family, config: ModelConfig, dtype: str) -> Self:
        with dtype_policy(dtype):
            inputs, outputs = family.build(config)
            return cls(inputs, outputs, name=family.model_type, config=config)

    @property
    def vocabulary_size(self) -> int:
        """Number of tokens."""
        return self.output["logits"].shape[-1]

    @property
    def product_dtype(self) -> str:
        """What the graph computes in; the policy of a rewired model says nothing of it."""
        return str(self.output["hidden"].dtype)

    @property
    def module_names(self) -> dict[str, str]:
        """Path of each layer with a matrix -> name of the module in the family's checkpoints.

        The head that an embedding is, too, has the path of the embedding with ":reverse" behind.
        """
        family = self._family()
        if family is None:
            return {}
        names = module_names(family.rows(self.config), self.config.num_layers)
        if self.config.tie_word_embeddings:
            names[f"token_embedding{REVERSED}"] = HEAD.removesuffix(".weight")
        return names

    @property
    def peft_names(self) -> Names:
        """What PEFT's files call the parts of this model, and the model."""
        family = self._family()
        if family is None:
            return Names()
        shapes, layers = shapes_of(self.variables), self.config.num_layers
        tensors = expand_table(family.rows(self.config), shapes, layers, strict=False)
        tied = tied_head(tensors) if self.config.tie_word_embeddings else None
        base, revision = (None, None) if self.preset is None else base_name(self.preset)
        return Names(
            modules=self.module_names,
            tensors=tensors,
            parameters=expand_table(
                family.parameter_rows(self.config), shapes, layers, strict=False
            ),
            inputs_first=family.inputs_first,
            tied=tied,
            base=base,
            revision=revision,
            licence=None if self.preset is None else licence_of(self.preset),
            write_tokenizer=self._write_known_tokenizer,
        )

    def _family(self) -> Family | None:
        fitting = (f for f in FAMILIES.values() if type(self.config) is f.config_class)
        return next(fitting, None)


def without_values(handle: str | Path, dtype: str = "float32") -> Backbone:
    """Returns a model as `from_preset` builds it, whose weights have shapes and no values."""
    family, config, edits = read_numbers(handle)
    with uninitialized():
        return apply_edits(Backbone._build(family, config, dtype), edits, has_values=False)


def _restored(
    make: Any,
    arguments: tuple[Any, ...],
    config: ModelConfig | None,
    preset: str | None,
    frozen: list[str],
    compiled: JSON | None,
    slots: list[np.ndarray],
) -> Backbone:
    """Returns the copy of a Backbone from what its `__reduce__` has kept."""
    new: Backbone = make(*arguments)
    new.config, new.preset = config, preset
    freeze_variables(new, [v for v in new.variables if v.path in frozen])
    if compiled is not None:
        new.compile_from_config(compiled)
        variables = new.optimizer.variables if new.optimizer else []
        if len(variables) == len(slots):  # not, if the original's was not built yet
            for variable, value in zip(variables, slots, strict=True):
                variable.assign(value)
    return new
