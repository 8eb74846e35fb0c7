"""Samplers: what they keep, what they draw, and that their numbers are traced."""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers.generation import logits_process

from functional_llm import samplers
from functional_llm.generation.samplers import (
    Categorical,
    Greedy,
    MinP,
    RepetitionPenalty,
    Temperature,
    TopK,
    TopP,
)

untyped: Any = samplers  # for what a type checker would refuse

VOCABULARY_SIZES = (2, 37, 257, 1000, 49152)


def random_logits(batch_size, vocabulary_size, seed=0, scale=3.0):
    """Makes logits without ties: every value occurs once in its row."""
    rng = np.random.default_rng(seed)
    logits = (rng.normal(size=(batch_size, vocabulary_size)) * scale).astype(np.float32)
    for row in logits:
        while len(np.unique(row)) < vocabulary_size:
            _, first = np.unique(row, return_index=True)
            repeated = np.setdiff1d(np.arange(vocabulary_size), first)
            row[repeated] = (rng.normal(size=len(repeated)) * scale).astype(np.float32)
    return logits


def make_keys(batch_size, seed=0):
    return jax.random.split(jax.random.key(seed), batch_size)


@jax.jit
def run(function, *args):
    """Calls a transform or a sampler; one compilation a list of parts and shape."""
    return function(*args)


def run_part(part, logits, seen=None):
    return np.asarray(run(part, logits, seen))


def run_reference(processor, logits, ids=None):
    ids = torch.zeros((len(logits), 1), dtype=torch.long) if ids is None else torch.tensor(ids)
    return processor(ids, torch.tensor(np.asarray(logits))).numpy()


# --- The same as Transformers -------------------------------------------------------------------


@pytest.mark.parametrize("vocabulary_size", VOCABULARY_SIZES)
@pytest.mark.parametrize("k", [1, 2, 50, 999, 49152, 100_000])
def test_top_k_equals_transformers(vocabulary_size, k):
    logits = random_logits(3, vocabulary_size, seed=k)
    expected = run_reference(logits_process.TopKLogitsWarper(k), logits)
    np.testing.assert_array_equal(run_part(TopK(k), logits), expected)
    assert (np.isfinite(expected).sum(-1) == min(k, vocabulary_size)).all()


@pytest.mark.parametrize("vocabulary_size", VOCABULARY_SIZES)
@pytest.mark.parametrize("p", [1e-12, 1e-3, 0.1, 0.5, 0.9, 0.95, 0.99, 0.999, 1.0])
@pytest.mark.parametrize("scale", [0.5, 3.0])
def test_top_p_equals_transformers(vocabulary_size, p, scale):
    logits = random_logits(3, vocabulary_size, seed=7, scale=scale)
    expected = run_reference(logits_process.TopPLogitsWarper(p), logits)
    kept = run_part(TopP(p), logits)
    np.testing.assert_array_equal(kept, expected)
    assert np.isfinite(kept).any(-1).all()


@pytest.mark.parametrize("vocabulary_size", VOCABULARY_SIZES)
@pytest.mark.parametrize("p", [1e-6, 0.02, 0.05, 0.5, 0.999, 1.0])
def test_min_p_equals_transformers(vocabulary_size, p):
    logits = random_logits(3, vocabulary_size, seed=3)
    expected = run_reference(logits_process.MinPLogitsWarper(p), logits)
    np.testing.assert_array_equal(run_part(MinP(p), logits), expected)


@pytest.mark.parametrize("temperature", [1e-3, 0.3, 0.7, 1.0, 1.7, 100])
def test_temperature_equals_transformers(temperature):
    logits = random_logits(3, 1000)
    expected = run_reference(logits_process.TemperatureLogitsWarper(float(temperature)), logits)
    # XLA multiplies by the reciprocal, which is one unit in the last place from a division.
    np.testing.assert_array_max_ulp(run_part(Temperature(temperature), logits), expected, 1)


@pytest.mark.parametrize("penalty", [0.5, 1.0, 1.1, 1.3, 5.0])
def test_repetition_penalty_equals_transformers(penalty):
    logits = random_logits(3, 1000)
    ids = np.random.default_rng(1).integers(0, 1000, size=(3, 40))
    seen = np.zeros(logits.shape, bool)
    np.put_along_axis(seen, ids, True, axis=1)
    processor = logits_process.RepetitionPenaltyLogitsProcessor(penalty)
    expected = run_reference(processor, logits, ids)
    np.testing.assert_array_max_ulp(run_part(RepetitionPenalty(penalty), logits, seen), expected, 1)


@pytest.mark.parametrize("vocabulary_size", [257, 49152])
def test_chain_keeps_what_transformers_keeps(vocabulary_size):
    logits = random_logits(4, vocabulary_size, seed=11)
    ids = np.random.default_rng(1).integers(0, vocabulary_size, size=(4, 20))
    seen = np.zeros(logits.shape, bool)
    np.put_along_axis(seen, ids, True, axis=1)
    expected = logits
    for processor in (
        logits_process.RepetitionPenaltyLogitsProcessor(1.2),
        logits_process.TemperatureLogitsWarper(0.8),
        logits_process.TopKLogitsWarper(40),
        logits_process.TopPLogitsWarper(0.9),
        logits_process.MinPLogitsWarper(0.05),
    ):
        expected = run_reference(processor, expected, ids)
    chain = samplers.make(temperature=0.8, top_k=40, top_p=0.9, min_p=0.05, repetition_penalty=1.2)
    result = np.asarray(chain.transform(jnp.asarray(logits), jnp.asarray(seen)))
    np.testing.assert_array_equal(np.isfinite(result), np.isfinite(expected))
    kept = np.isfinite(expected)
    np.testing.assert_array_max_ulp(result[kept], expected[kept], 2)


# --- Ties and edges -----------------------------------------------------------------------------


def test_ties_stay_together():
    logits = np.array([[1.0, 3.0, 2.0, 2.0, 2.0, 0.0]], np.float32)
    assert np.isfinite(run_part(TopK(2), logits)).tolist() == [[0, 1, 1, 1, 1, 0]]
    # The largest has 0.42; with one of the three that tie it has 0.57.
    assert np.isfinite(run_part(TopP(0.5), logits)).tolist() == [[0, 1, 1, 1, 1, 0]]
    assert np.isfinite(run_part(TopP(0.4), logits)).tolist() == [[0, 1, 0, 0, 0, 0]]
    assert np.isfinite(run_part(MinP(0.3), logits)).tolist() == [[0, 1, 1, 1, 1, 0]]
    assert np.isfinite(run_part(TopK(1), np.zeros((1, 5), np.float32))).all()


def test_zero_ties_with_negative_zero():
    logits = np.array([[-0.0, 0.0, -1.0]], np.float32)
    assert np.isfinite(run_part(TopK(1), logits)).tolist() == [[True, True, False]]


@pytest.mark.parametrize("part", [TopK(3), TopP(0.9), TopP(1.0), MinP(0.01)])
def test_removed_tokens_stay_removed(part):
    logits = np.array([[-np.inf, 1.0, -np.inf, 2.0]], np.float32)
    kept = run_part(part, logits)
    np.testing.assert_array_equal(kept, logits)


def test_parts_apply_in_the_order_written():
    logits = np.array([[0.0, 1.0, 2.0, 3.0]], np.float32)
    hot_first = Categorical((Temperature(10.0), TopP(0.6))).transform(jnp.asarray(logits), None)
    hot_last = Categorical((TopP(0.6), Temperature(10.0))).transform(jnp.asarray(logits), None)
    assert np.isfinite(hot_first).sum() == 3
    assert np.isfinite(hot_last).sum() == 1


def test_greedy_takes_the_lowest_id_of_a_tie():
    logits = jnp.asarray([[0.0, 5.0, 5.0], [2.0, 1.0, 2.0]], jnp.bfloat16)
    token = Greedy()(logits, None)
    assert token.tolist() == [1, 0] and token.dtype == jnp.int32


def test_greedy_with_parts():
    logits = jnp.asarray([[3.0, 2.9, -1.0]])
    seen = jnp.asarray([[True, False, False]])
    sampler = Greedy((RepetitionPenalty(1.2),))
    assert sampler.needs_seen
    assert sampler(logits, None, seen).tolist() == [1]
    with pytest.raises(ValueError, match=r"seen_BV.*Received: None"):
        sampler(logits, None)


def test_tiny_temperature_is_greedy():
    logits = jnp.asarray(random_logits(4, 1000))
    for temperature in (1e-6, 1e-37):
        token = run(Categorical((Temperature(temperature), TopP(0.9))), logits, make_keys(4))
        assert token.tolist() == jnp.argmax(logits, axis=-1).tolist()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("sampler", [Greedy(), Categorical(), samplers.make(0.7, 5, 0.9, 0.1)])
def test_broken_logits_give_an_id_of_the_vocabulary(sampler, value):
    logits = np.full((2, 300), value, np.float32)
    logits[1, 7] = 0
    assert all(0 <= token < 300 for token in run(sampler, logits, make_keys(2)).tolist())


# --- The draw -----------------------------------------------------------------------------------


def chi_square(sampler, logits, draws):
    """Returns by how many deviations chi-square is above its mean, and the tokens drawn."""
    batch = jnp.broadcast_to(jnp.asarray(logits), (draws, len(logits)))
    token = np.asarray(run(sampler, batch, make_keys(draws, seed=1)))
    observed = np.bincount(token, minlength=len(logits))
    kept = np.asarray(sampler.transform(jnp.asarray(logits)[None], None))[0].astype(np.float64)
    expected = np.exp(kept - kept.max())
    expected *= draws / expected.sum()
    assert (observed[expected == 0] == 0).all()
    likely = expected >= 5
    statistic = ((observed - expected)[likely] ** 2 / expected[likely]).sum()
    freedom = likely.sum() - 1
    return (statistic - freedom) / np.sqrt(2 * freedom), token


@pytest.mark.parametrize(
    ("sampler", "vocabulary_size"),
    [
        (Categorical(), 40),
        (Categorical(), 700),
        (Categorical((Temperature(0.7),)), 40),
        (samplers.get("top_k", top_k=20), 700),
        (samplers.get("top_p", top_p=0.8, temperature=1.5), 700),
        (samplers.get("min_p"), 40),
    ],
)
def test_draws_follow_the_probabilities(sampler, vocabulary_size):
    statistic, _ = chi_square(sampler, random_logits(1, vocabulary_size, scale=1.0)[0], 20_000)
    assert statistic < 3.5


def test_every_block_boundary_is_drawn():
    logits = np.full(1025, -np.inf, np.float32)
    boundaries = [0, 255, 256, 511, 512, 1023, 1024]
    logits[boundaries] = 0
    statistic, token = chi_square(Categorical(), logits, 5_000)
    assert sorted(set(token.tolist())) == boundaries
    assert statistic < 3.5


@pytest.mark.parametrize("vocabulary_size", [1000, 49152])
@pytest.mark.parametrize(
    "sampler",
    [
        samplers.make(temperature=0.8, top_k=40, top_p=0.9, min_p=0.02, repetition_penalty=1.1),
        Greedy((RepetitionPenalty(1.3),)),
    ],
)
def test_a_row_draws_the_same_alone_and_in_a_batch(sampler, vocabulary_size):
    logits, keys = jnp.asarray(random_logits(8, vocabulary_size)), make_keys(8, seed=5)
    seen = logits > 1
    batch = run(sampler, logits, keys, seen).tolist()
    for rows in ([0], [3], [7], [6, 1, 4]):
        index = jnp.asarray(rows)
        alone = run(sampler, logits[index], keys[index], seen[index]).tolist()
        assert alone == [batch[row] for row in rows]


# --- Numbers are traced -------------------------------------------------------------------------


def test_numbers_do_not_retrace_but_parts_do():
    traces = []

    @jax.jit
    def step(sampler, logits, keys, seen):
        traces.append(sampler)
        return sampler(logits, keys, seen)

    logits, keys = jnp.asarray(random_logits(2, 100)), make_keys(2)
    seen = logits > 2

    def sample(*parts):
        return step(Categorical(parts), logits, keys, seen)

    sample(RepetitionPenalty(1.1), Temperature(0.7), TopK(50), TopP(0.9), MinP(0.1))
    sample(RepetitionPenalty(2), Temperature(1), TopK(7), TopP(1), MinP(1))
    sample(
        untyped.RepetitionPenalty(np.float32(1.5)),
        Temperature(np.float64(0.1)),
        untyped.TopK(np.int64(3)),
        untyped.TopP(np.float16(0.5)),
        MinP(0.3),
    )
    assert len(traces) == 1
    sample(Temperature(0.7), RepetitionPenalty(1.1), TopK(50), TopP(0.9), MinP(0.1))
    assert len(traces) == 2
    sample(Temperature(0.7))
    step(Greedy(), logits, keys, seen)
    assert len(traces) == 4
    step(Greedy(), logits, keys, seen)
    sample(Temperature(3.0))
    assert len(traces) == 4


def test_unflatten_does_not_validate():
    sampler = samplers.make(temperature=0.5, top_k=3)
    leaves, structure = jax.tree_util.tree_flatten(sampler)
    assert leaves == [0.5, 3]
    emptied = jax.tree_util.tree_unflatten(structure, [None, object()])
    assert emptied.parts[0].temperature is None
    assert TopP(0.9).tail == 1 - 0.9
    assert jax.tree.map(lambda x: -x, sampler).parts[1].k == -3
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(sampler)]
    assert paths == [".parts[0].temperature", ".parts[1].k"]


def test_numbers_may_be_tracers_and_arrays():
    logits, keys = jnp.asarray(random_logits(2, 100)), make_keys(2)
    sample = jax.jit(lambda t, k: Categorical((Temperature(t), TopK(k)))(logits, keys))
    assert sample(0.5, 1).tolist() == jnp.argmax(logits, -1).tolist()
    assert run(Greedy((TopK(jnp.asarray(1)),)), logits, None).tolist() == sample(0.5, 1).tolist()


def test_a_transform_of_ones_own():
    @samplers.register_part
    @dataclasses.dataclass(frozen=True)
    class Forbid:
        token_id: int
        needs_seen: ClassVar[bool] = False

        def __call__(self, logits_BV, seen_BV):
            id_V = jnp.arange(logits_BV.shape[-1])
            return jnp.where(id_V == self.token_id, -jnp.inf, logits_BV)

    logits = jnp.asarray([[1.0, 5.0, 2.0]])
    assert jax.jit(lambda s: s(logits, None))(Greedy((Forbid(1),))).tolist() == [2]


# --- Names and bad input ------------------------------------------------------------------------


def test_get_by_name():
    assert samplers.get("greedy") == Greedy()
    assert samplers.get("random") == samplers.get("categorical") == Categorical()
    assert samplers.get("top_k") == Categorical((TopK(50),))
    assert samplers.get("top_p", temperature=0.7) == Categorical((Temperature(0.7), TopP(0.9)))
    assert samplers.get("min_p", min_p=0.2, top_k=None) == Categorical((MinP(0.2),))
    penalty = RepetitionPenalty(1.1)
    assert samplers.get("greedy", repetition_penalty=1.1) == Greedy((penalty,))
    assert samplers.get(Greedy((penalty,))) == Greedy((penalty,))
    assert samplers.make() == Categorical()
    assert not samplers.make(temperature=1).needs_seen
    assert samplers.make(repetition_penalty=1.1).needs_seen


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: untyped.Temperature(0),
            r'number above 0. Received: 0\. .*sampler="greedy"',
        ),
        (lambda: untyped.Temperature(-1.0), r'Received: -1\.0\. .*sampler="greedy"'),
        (lambda: untyped.Temperature(1e-50), "Received: 1e-50"),  # zero in float32
        (lambda: untyped.Temperature(float("nan")), "Received: nan"),
        (lambda: untyped.Temperature(float("inf")), "Received: inf"),
        (lambda: untyped.Temperature(1e39), "Received: 1e"),
        (lambda: untyped.Temperature("0.7"), "Received: '0.7'"),
        (lambda: untyped.Temperature(True), "Received: True"),
        (lambda: untyped.Temperature(None), "Received: None"),
        (lambda: untyped.TopK(0), "`k` to be an integer of at least 1. Received: 0"),
        (lambda: untyped.TopK(-5), "Received: -5"),
        (lambda: untyped.TopK(5.0), r"Received: 5\.0"),
        (lambda: untyped.TopK(2**31), "Received: 2147483648"),
        (lambda: untyped.TopP(0.0), r"above 0 and at most 1. Received: 0\.0"),
        (lambda: untyped.TopP(1.0000001), r"Received: 1\.0000001"),
        (lambda: untyped.TopP(float("nan")), "Received: nan"),
        (lambda: untyped.MinP(-0.1), "MinP expected `p`"),
        (lambda: untyped.MinP(2), "Received: 2"),
        (lambda: untyped.RepetitionPenalty(0.0), "`penalty` to be a finite number above 0"),
        (lambda: untyped.RepetitionPenalty(float("inf")), "Received: inf"),
        (lambda: untyped.Categorical(Temperature(1.0)), "tuple of logit transforms"),
        (lambda: untyped.Categorical((Temperature,)), "tuple of logit transforms"),
        (lambda: untyped.Greedy((lambda logits, seen: logits,)), "register_part"),
        (lambda: untyped.get("topk"), "greedy, random, .*'topk'. Did you mean 'top_k'?"),
        (lambda: untyped.get("beam"), "greedy, random, .*Received: 'beam'"),
        (lambda: untyped.get(None), "Expected the name of a sampler"),
        (lambda: untyped.get(Greedy), "Expected the name of a sampler"),
        (lambda: untyped.get(Greedy(), temperature=1.0), "no numbers beside it"),
        (lambda: untyped.get("top_k", k=5), "takes the numbers .*top_k.* Received: k"),
        (lambda: untyped.get("greedy", temperature=0.5), "Received: temperature"),
        (lambda: untyped.get("random", temperature=0), "Temperature expected"),
        (lambda: untyped.Greedy()(jnp.zeros(5), None), r"\(batch, vocabulary\).*\(5,\)"),
        (lambda: untyped.Categorical()(jnp.zeros((1, 5)), None), "one JAX key a row"),
    ],
)
def test_bad_input_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
