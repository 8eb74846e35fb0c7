"""Logits that are NaN or infinite: generation says so, and never writes what they would give."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from keras import ops

import functional_llm as flm
from functional_llm.generation.programs import NOT_FINITE, CompiledPrograms, Prompt
from functional_llm.generation.samplers import Greedy
from nightly import FAMILIES_AND_KINDS, one_of_a_few

IDS = [5, 9, 20, 7]
DTYPES = ("float16", "bfloat16", "float32")


@one_of_a_few  # what overflows differs with norms and activations
@pytest.mark.parametrize("name", FAMILIES_AND_KINDS)
def test_a_weight_too_large_for_float16_is_noticed(
    checkpoint: Callable[[str], Path], name: str
) -> None:
    """The first token is that of the graph's own logits, unless those are not finite."""
    backbone: Any = flm.Backbone.from_preset(str(checkpoint(name)), dtype="float16")
    programs = CompiledPrograms(backbone)
    positions = np.arange(len(IDS), dtype="int32")[None]
    last = np.array([len(IDS) - 1], "int32")
    prompt = Prompt(np.array([IDS], "int32"), positions, last, None, None, None)

    @jax.jit
    def run(weights: Any) -> Any:
        inputs = {"token_ids": prompt.tokens, "positions": positions}
        logits_BV, _ = programs._forward(weights, inputs, last)
        return logits_BV, programs._prefill_program(8)(weights, prompt, Greedy())[0]

    results = set()
    matrices = [v for v in backbone.variables if len(v.shape) > 1]
    for factor in (1.0, 3e4):
        for matrix in matrices:
            before = ops.copy(matrix.value)
            matrix.assign(ops.clip(ops.cast(before, "float32") * factor, -6e4, 6e4))
            (logits_V,), (token,) = jax.tree.map(np.asarray, run(programs.weights()))
            matrix.assign(before)
            is_finite = not np.isnan(logits_V).any() and logits_V.max() < np.inf
            results.add(bool(is_finite))
            assert token == (logits_V.argmax() if is_finite else NOT_FINITE), matrix.path
    assert results == {True, False}


@pytest.fixture
def backbone(checkpoint: Callable[[str], Path]) -> Any:
    return flm.Backbone.from_preset(str(checkpoint("llama_grouped")), dtype="float16")


def test_the_message_names_a_dtype_that_would_do(backbone: Any) -> None:
    generator = flm.TextGenerator(backbone)
    expected = "NaN or infinity in float16, whose numbers end at 65504.* bfloat16 or float32"
    messages = []
    for matrix in [v for v in backbone.variables if len(v.shape) > 1]:
        before = ops.copy(matrix.value)
        matrix.assign(ops.clip(ops.cast(before, "float32") * 3e4, -6e4, 6e4))
        try:
            generator.generate_ids([[1], IDS], 4)
        except RuntimeError as error:
            messages.append(str(error))
        matrix.assign(before)
    assert messages and all(re.search(expected, message) for message in messages)
    assert generator.num_compilations == 2


def test_what_is_not_finite_after_the_first_token_is_noticed(backbone: Any) -> None:
    generator = flm.TextGenerator(backbone)
    (first,) = generator.generate_ids([IDS], 1)[0]
    embeddings = backbone.get_layer("token_embedding").embeddings
    table = np.array(embeddings)
    table[first] = np.inf  # only the decode loop reads it
    embeddings.assign(table)
    assert first not in IDS and generator.generate_ids([IDS], 1) == [[first]]
    past = flm.PromptCache()
    run = generator._run([IDS], 8, "greedy", [], 1, past)
    assert next(run).ids == [[first]]
    with pytest.raises(RuntimeError, match="1 of the weights .token_embedding/embeddings. in fl"):
        next(run)
    assert past.reuse([*IDS, first, 3]) == (0, None)


@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_that_are_not_finite_are_named(
    checkpoint: Callable[[str], Path], dtype: str
) -> None:
    backbone: Any = flm.Backbone.from_preset(str(checkpoint("llama_grouped")), dtype=dtype)
    kernel = backbone.get_layer("head").kernel
    kernel.assign(ops.full(kernel.shape, np.nan))
    advice = "bfloat16 or float32" if dtype == "float16" else "No other dtype would do"
    with pytest.raises(RuntimeError, match=rf"1 of the weights \(head/kernel\).*{advice}"):
        flm.TextGenerator(backbone).generate_ids([IDS], 4)
