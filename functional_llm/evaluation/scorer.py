"""Log-probabilities of given continuations.

Shapes: B rows, T tokens, N = B * T tokens in a row, C tokens of a chunk, D model, V vocabulary.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Self, TypeAlias

import jax
import jax.numpy as jnp
import keras
import numpy as np

from functional_llm.evaluation.batches import Batch, Contexts, make_batches
from functional_llm.evaluation.rows import Row, check_rows, encode_rows
from functional_llm.generation.compilation_cache import use_compilation_cache
from functional_llm.generation.equal_layers import trace_equal_layers_once
from functional_llm.generation.not_finite import not_finite_error
from functional_llm.generation.programs import Weights
from functional_llm.generation.samplers import Greedy
from functional_llm.generation.text_generator import TextGenerator
from functional_llm.graph.backend import require_jax
from functional_llm.graph.placing import to_numpy
from functional_llm.graph.precision import full_float32
from functional_llm.graph.types import Tensor
from functional_llm.layers.cache import Cache, capped_num_slots, fill_cache, num_slots
from functional_llm.layers.call_inputs import complete_inputs
from functional_llm.layers.long_texts import turning_lengths
from functional_llm.presets import Tokenizer
from functional_llm.tokenizers import TextTokenizer
from functional_llm.training.cross_entropy import choose_chunk_size
from functional_llm.training.display import Display, make_display
from functional_llm.xla.rewriter import compiler_options, optimize_for_cpu, optimize_for_gpu

# Tokens of a batch. On CPUs products are as fast as they get with a few hundred rows.
_TOKENS_ON_CPU = 2048
_TOKENS = 16384
_QUIET_SECONDS = 5.0  # of work that shows no progress

_Scores: TypeAlias = tuple[jax.Array, jax.Array]  # log-probabilities, whether the likeliest


@dataclass(frozen=True, eq=False)
class Score:
    """How probable a model finds a continuation.

    Args:
        token_ids: The continuation's tokens.
        token_log_probabilities: Of each, given all that comes before; natural logarithms, float32.
        is_greedy: Whether greedy decoding would write the continuation.
    """

    token_ids: list[int]
    token_log_probabilities: np.ndarray
    is_greedy: bool

    @property
    def log_probability(self) -> float:
        """The continuation's: the sum of its tokens'."""
        return float(self.token_log_probabilities.sum(dtype="float64"))

    @property
    def num_tokens(self) -> int:
        """How many tokens the continuation has."""
        return len(self.token_ids)


class Scorer:
    """Finds log-probabilities of given text; holds the compiled programs.

    It runs the graph that trains, whatever it was rewired to. The head computes the logits of a few
    tokens at a time, and only of those that somebody asks for. Rows are sorted by length and padded
    to few lengths; several continuations of one context read it once, and so do contexts that
    begin alike, as behind the same examples. New values of the weights are used at the next call.

    Args:
        model: A Backbone, any functional model with its inputs and outputs, a `TextGenerator`, or a
            `Scorer`.
        tokenizer: The model's tokenizer. By default the generator's, or that of the preset that the
            backbone was loaded from, if there is one.

    Raises:
        RuntimeError: With another backend than JAX.
        ValueError: If the model has other outputs.
    """

    def __init__(
        self, model: "keras.Model | TextGenerator | Scorer", tokenizer: TextTokenizer | None = None
    ) -> None:
        require_jax("flm.Scorer")
        given = model
        if isinstance(model, TextGenerator):
            model, tokenizer = model.backbone, tokenizer or model.tokenizer
        elif isinstance(model, Scorer):
            model, tokenizer = model.backbone, tokenizer or model._tokenizer
        outputs = getattr(model, "output", None)
        if not isinstance(outputs, dict) or not {"hidden", "logits", "cache"} <= set(outputs):
            raise ValueError(
                "Expected a Backbone, or a functional model with the outputs `hidden`, `logits` "
                f"and `cache`. Received: {given!r:.200}."
            )
        self.backbone: keras.Model = model
        self._tokenizer = tokenizer
        kept = {name: outputs[name] for name in ("hidden", "cache")}
        self._trunk = trace_equal_layers_once(keras.Model(model.input, kept))
        self._head = keras.Model(outputs["hidden"], outputs["logits"])
        self._variables = model.variables
        self._turning_lengths = turning_lengths(model)
        self._read, self._program = (
            jax.jit(
                optimize_for_gpu(optimize_for_cpu(function)), compiler_options=compiler_options()
            )
            for function in (self._read_contexts, self._score_batch)
        )
        use_compilation_cache()

    @classmethod
    def of(
        cls, model: "keras.Model | TextGenerator | Scorer", tokenizer: TextTokenizer | None
    ) -> Self:
        """Returns the model if it is a scorer already, else a new one."""
        return model if isinstance(model, cls) and tokenizer is None else cls(model, tokenizer)

    @property
    def tokenizer(self) -> TextTokenizer:
        """The model's tokenizer.

        Raises:
            ValueError: If there is none.
        """
        if self._tokenizer is None:
            preset = getattr(self.backbone, "preset", None)
            if preset is None:
                raise ValueError("There is no tokenizer for texts: give one, or use token ids.")
            self._tokenizer = Tokenizer.from_preset(preset)
        return self._tokenizer

    @property
    def context(self) -> int | None:
        """Most tokens that the model reads; `None` if it has no limit."""
        config = getattr(self.backbone, "config", None)
        return getattr(config, "max_sequence_length", None)

    @property
    def vocabulary_size(self) -> int:
        """Number of tokens."""
        return self.backbone.output["logits"].shape[-1]

    def score(
        self,
        rows: Sequence[Any],
        batch_size: int | None = None,
        parse_special: bool = True,
        names: Sequence[str] | None = None,
    ) -> list[Score]:
        """Returns how probable each continuation is after its context.

        Args:
            rows: Pairs (context, continuation). Both are texts, encoded as lm-evaluation-harness
                does it; or both are lists of ids. A context may be messages, which the chat
                template writes, up to where the answer begins; or empty: then BOS, or EOS,
                stands there.
            batch_size: Most rows that the model reads at once. By default as many as keep the
                processor busy.
            parse_special: Whether the names of special tokens in a text ("<|im_end|>") are these
                tokens. `False` for a text from strangers.
            names: What messages call each row; "Row 0" and so on by default.

        Returns:
            A score for each row, in their order.

        Raises:
            ValueError: If a row is no such pair, is longer than the model's context, or has a
                continuation without tokens.
            RuntimeError: If the model's logits are not finite.
        """
        encoded = encode_rows(rows, lambda: self.tokenizer, parse_special, names)
        return self.score_ids(encoded, batch_size, names)

    def score_ids(
        self,
        rows: Sequence[Row],
        batch_size: int | None = None,
        names: Sequence[str] | None = None,
    ) -> list[Score]:
        """As `score`, for rows of ids that are of the right type already."""
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"Expected a batch size of at least 1, received {batch_size!r}.")
        check_rows(rows, names, self.vocabulary_size, self.context)
        tokens = _TOKENS_ON_CPU if jax.default_backend() == "cpu" else _TOKENS
        weights = [variable.value for variable in self._variables]
        results: dict[int, Score] = {}
        with _progress(len(rows)) as progress:
            prefix, before = None, None
            for work in make_batches(rows, tokens, batch_size, self._turning_lengths):
                if work.prefix is not prefix:
                    prefix = work.prefix
                    before = None if prefix is None else self._read(weights, prefix)
                contexts = work.contexts
                new = None if contexts is None else self._read(weights, contexts, before)
                for places, batch in work.batches:
                    found = map(to_numpy, self._program(weights, batch, new))
                    results |= self._collect(rows, places, batch, *found)
                    progress(len(results))
        return [results[i] for i in range(len(rows))]

    def _collect(
        self,
        rows: Sequence[Row],
        places: list[int],
        batch: Batch,
        log_BT: np.ndarray,
        greedy_BT: np.ndarray,
    ) -> dict[int, Score]:
        results = {}
        for i, place in enumerate(places):
            is_asked_T = batch.labels[i] >= 0
            log_T = log_BT[i, is_asked_T]
            if np.isnan(log_T).any():
                raise not_finite_error(self.backbone)
            is_greedy = bool(greedy_BT[i, is_asked_T].all())
            results[place] = Score(rows[place].continuation, log_T, is_greedy)
        return results

    def _read_contexts(
        self, weights: Weights, contexts: Contexts, before: Cache | None = None
    ) -> Cache:
        """Returns what the model keeps of contexts, to be stored in a cache: (C, L, ...) arrays.

        `before` is the same of the one row that stands before all of them, and then in the result.
        """
        with self._using(weights):
            cache = None
            if before is not None:
                rows, length = contexts.tokens.shape
                owners = jnp.zeros(rows, "int32")
                cache = self._copies(before, owners, num_slots(before) + length)
            return self._run(contexts.tokens, contexts.positions, cache)["cache"]

    def _copies(self, new: Cache, owners_B: Tensor, most: int) -> Cache:
        """Returns a cache of what was kept of other rows, for so many tokens."""
        cache = fill_cache(self.backbone, new, capped_num_slots(self.backbone, most))
        return jax.tree.map(lambda x: x[owners_B], cache)

    def _score_batch(self, weights: Weights, batch: Batch, new: Cache | None = None) -> _Scores:
        """Returns of each token that has a label its log-probability, and whether it is likeliest.

        Both (B, T). `new` is what `_read_contexts` returned of the contexts that the rows go on
        from.
        """
        with self._using(weights):
            cache = None
            if new is not None:
                most = num_slots(new) + batch.tokens.shape[1]
                cache = self._copies(new, batch.owners, most)
            hidden_BTD = self._run(batch.tokens, batch.positions, cache)["hidden"]
            return self._score_tokens(hidden_BTD, jnp.asarray(batch.labels))

    @contextmanager
    def _using(self, weights: Weights) -> Iterator[None]:
        pairs = list(zip(self._variables, weights, strict=True))
        precision = full_float32(str(self.backbone.output["hidden"].dtype))
        with keras.StatelessScope(state_mapping=pairs), precision:
            yield

    def _run(self, tokens_BT: Tensor, positions_BT: Tensor, cache: Any = None) -> Any:
        inputs = {"token_ids": tokens_BT, "positions": positions_BT, "cache": cache}
        if cache is None and "in_order" in self.backbone.input:
            inputs["in_order"] = True
        full = complete_inputs(self.backbone.input, self.vocabulary_size, inputs)
        return self._trunk(full, training=False)

    def _score_tokens(self, hidden_BTD: jax.Array, labels_BT: jax.Array) -> _Scores:
        """Runs the head on a few tokens at a time: the logits of all are never there at once."""
        labels_N = labels_BT.reshape(-1)
        total, width = labels_N.size, hidden_BTD.shape[-1]
        size = choose_chunk_size(jax.default_backend(), self.vocabulary_size, total)
        # Tokens with a label first: the chunks after them have nothing to compute.
        order_N = jnp.argsort(labels_N < 0, stable=True)
        padding = (0, -total % size)
        hidden_XCD = hidden_BTD.reshape(total, width)[jnp.pad(order_N, padding)]
        hidden_XCD = hidden_XCD.reshape(-1, size, width)
        labels_XC = jnp.pad(labels_N[order_N], padding, constant_values=-1).reshape(-1, size)

        def compute(hidden_CD: jax.Array, labels_C: jax.Array) -> _Scores:
            logits_CV = self._head(hidden_CD[None], training=False)[0].astype("float32")
            picked_C1 = jnp.take_along_axis(logits_CV, jnp.maximum(labels_C, 0)[:, None], axis=1)
            log_C = picked_C1[:, 0] - jax.nn.logsumexp(logits_CV, axis=1)
            return log_C, Greedy()(logits_CV, None) == labels_C

        def skip(hidden_CD: jax.Array, labels_C: jax.Array) -> _Scores:
            return jnp.zeros(labels_C.shape, "float32"), jnp.zeros(labels_C.shape, bool)

        def step(chunk: _Scores) -> _Scores:
            return jax.lax.cond(jnp.any(chunk[1] >= 0), compute, skip, *chunk)

        scores = jax.lax.map(step, (hidden_XCD, labels_XC))

        def in_place(x_XC: jax.Array) -> jax.Array:
            x_N = x_XC.reshape(-1)[:total]
            return jnp.zeros_like(x_N).at[order_N].set(x_N).reshape(labels_BT.shape)

        log_XC, greedy_XC = scores
        return in_place(log_XC), in_place(greedy_XC)


def score(
    model: keras.Model | TextGenerator | Scorer,
    rows: Sequence[Any],
    tokenizer: TextTokenizer | None = None,
    batch_size: int | None = None,
    parse_special: bool = True,
) -> list[Score]:
    """Returns how probable a model finds each continuation after its context.

    ```python
    best = max(flm.score(backbone, [("The sky is", " blue"), ("The sky is", " green")]), key=...)
    ```

    A model that is asked several times had better be a `Scorer`, which holds what was compiled.

    Args:
        model: As for `Scorer`.
        rows: As for `Scorer.score`.
        tokenizer: As for `Scorer`.
        batch_size: As for `Scorer.score`.
        parse_special: As for `Scorer.score`.

    Returns:
        A score for each row, in their order.

    Raises:
        ValueError: As `Scorer` and `Scorer.score`.
        RuntimeError: As `Scorer` and `Scorer.score`.
    """
    return Scorer.of(model, tokenizer).score(rows, batch_size, parse_special)


@contextmanager
def _progress(total: int) -> Iterator[Any]:
    """Yields what is told how many rows are done; what takes long is shown."""
    began, displays = time.monotonic(), list[Display]()

    def tell(done: int) -> None:
        for display in displays:
            display.show(done, {})
        if not displays and done < total and time.monotonic() - began > _QUIET_SECONDS:
            displays.append(make_display(total, done, "Scoring", "row"))

    try:
        yield tell
    finally:
        for display in displays:
            display.close()
