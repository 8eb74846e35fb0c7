"""Kernels: each equals the explicit definition, values and gradients, whatever it is given.

Shapes: B batch, T query tokens, S key slots, N query heads, K key/value heads, H and V head sizes.
"""

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import functional_llm as flm
from configs import CONFIGS
from functional_llm.kernels import (
    AttentionFacts,
    AttentionKernel,
    Mask,
    Scoring,
    attend_explicitly,
    choose_attention,
    register_attention,
)
from functional_llm.kernels import choice as choice_module
from functional_llm.kernels.blockwise import attend_in_blocks
from functional_llm.kernels.cudnn import attend_causally, attend_masked
from functional_llm.kernels.splash import attend_by_splash
from reference import save_reference

TOLERANCE = {"float32": 1e-5, "bfloat16": 3e-2}

# What each case has. Sizes fill no block; of `cache`, slots are a ring's, in any order.
CASES: dict[str, dict[str, Any]] = {
    "self": {},
    "self_all": {"window": 5, "cap": 1.5, "sinks": True, "slopes": True, "mask": True},
    "self_bfloat16": {"dtype": "bfloat16", "window": 4, "sinks": True},
    "packed": {"kind": "packed", "cap": 0.9},
    "packed_window_slopes": {"kind": "packed", "window": 3, "slopes": True, "skips": False},
    "cache": {"kind": "cache", "sinks": True, "skips": False},
    "ring_window_cap": {"kind": "cache", "window": 6, "cap": 2.0},
    "ring_own_mask_bfloat16": {"kind": "cache", "mask": True, "dtype": "bfloat16"},
    "chunks": {"firsts": True},
    "chunks_packed_slopes": {"kind": "packed", "firsts": True, "slopes": True, "skips": False},
    "ring_chunks": {"kind": "cache", "firsts": True, "sinks": True},
    "only_booleans": {"kind": "booleans", "mask": True, "sinks": True},
}
B, T, K, G, H, V = 2, 13, 2, 3, 5, 4


def _arrays(case: dict[str, Any], seed: int, sizes: Any = (B, T, K, G, H, V)) -> dict[str, Any]:
    """Returns random inputs: queries, keys, values, mask, sinks, slopes, and a gradient."""
    rng = np.random.default_rng(seed)
    batch, length, kv, groups, h, v = sizes
    kind, dtype = case.get("kind", "self"), case.get("dtype", "float32")
    slots = length + 8 if kind == "cache" else length
    positions = np.tile(np.arange(length), (batch, 1))
    slot_positions, segments = positions, None
    if kind == "packed":
        segments = np.sort(rng.integers(0, 4, (batch, length)), axis=1)
    if kind == "cache":
        positions = positions + 9
        ring = rng.permuted(np.tile(np.arange(1, 9), (batch, 1)), axis=1)
        ring[rng.random(ring.shape) < 0.2] = -1
        slot_positions = np.concatenate([ring, positions], axis=1)
    if kind in ("self", "packed") and not case.get("in_order"):
        positions = np.where(rng.random(positions.shape) < 0.2, -1, positions)
        slot_positions = positions
    mask: dict[str, Any] = {}
    if kind != "booleans":
        mask |= {"query_positions": positions, "slot_positions": slot_positions}
    if segments is not None:
        mask["segment_ids"] = segments
    if case.get("firsts"):
        mask["first_positions"] = positions // 5 * 5
    mask = {name: jnp.asarray(x, "int32") for name, x in mask.items()}
    if case.get("mask"):
        mask["mask"] = jnp.asarray(rng.random((batch, length, slots)) < 0.6)
    heads = kv * groups
    sizes = (length, heads, h), (slots, kv, h), (slots, kv, v), (length, heads, v)
    shapes = [(batch, *size) for size in sizes]
    query, key, value, gradient = (jnp.asarray(rng.normal(size=s), dtype) for s in shapes)
    of_heads = rng.normal(size=heads), rng.random(heads)
    sinks, slopes = (
        jnp.asarray(x, "float32") if case.get(name) else None
        for name, x in zip(("sinks", "slopes"), of_heads, strict=True)
    )
    return {"factors": (query, key, value, sinks, slopes), "mask": mask, "gradient": gradient}


def _runner(attend: Any, case: dict[str, Any]) -> Any:
    """Returns a program for outputs and gradients; rows that see nothing are left out."""
    window, scoring = case.get("window"), Scoring(0.7, case.get("cap"))

    @jax.jit
    def run(factors: Any, mask: Any, gradient: Any) -> Any:
        described = Mask(**mask, window=window, in_order=case.get("in_order", False))
        sees = described.visible().any(2)[:, :, None, None]
        zero = jnp.zeros((), gradient.dtype)

        def call(query: Any, key: Any, value: Any, sinks: Any, slopes: Any) -> Any:
            out = attend(query, key, value, described, scoring, sinks, slopes)
            return jnp.where(sees, out, zero)

        out, pull = jax.vjp(call, *factors)
        return out, *pull(jnp.where(sees, gradient, zero))

    def numbers(**arrays: Any) -> list[np.ndarray]:
        return [np.asarray(x, "float32") for x in run(**arrays) if x is not None]

    return numbers


def _differences(received: list[np.ndarray], expected: list[np.ndarray]) -> list[float]:
    """Returns relative differences, of outputs and of each gradient."""
    pairs = zip(received, expected, strict=True)
    return [float(np.abs(x - y).max() / max(1.0, np.abs(y).max())) for x, y in pairs]


@pytest.mark.parametrize("name", CASES)
def test_blocks_equal_the_definition(name: str) -> None:
    case = CASES[name]
    skips = case.get("skips", True)
    blocks = partial(attend_in_blocks, block_queries=4, block_slots=6, skips=skips)
    received, expected = _runner(blocks, case), _runner(attend_explicitly, case)
    for seed in range(3):
        arrays = _arrays(case, seed)
        differences = _differences(received(**arrays), expected(**arrays))
        assert max(differences) <= TOLERANCE[case.get("dtype", "float32")], differences


@pytest.mark.parametrize(
    ("name", "dropped"),
    [
        ("self_all", "window"),
        ("self_all", "cap"),
        ("self_all", "sinks"),
        ("self_all", "slopes"),
        ("self_all", "mask"),
        ("self_all", "query_positions"),
        ("packed", "segment_ids"),
        ("cache", "slot_positions"),
        ("chunks", "first_positions"),
    ],
)
def test_the_comparison_sees_what_is_dropped(name: str, dropped: str) -> None:
    case, arrays = CASES[name], _arrays(CASES[name], 0)
    right = _runner(attend_explicitly, case)(**arrays)[0]
    less, mask = {**case, dropped: None}, dict(arrays["mask"])
    factors = list(arrays["factors"])
    if dropped in ("sinks", "slopes"):
        factors[3 if dropped == "sinks" else 4] = None
    elif dropped.endswith("positions"):  # who sees whom, by other positions
        mask[dropped] = jnp.roll(mask[dropped], 1, axis=1)
    else:
        mask.pop(dropped, None)
    less_arrays = {**arrays, "factors": factors, "mask": mask}
    wrong = _runner(attend_explicitly, less)(**less_arrays)[0]
    assert np.abs(wrong - right).max() > 1e-2


CHIP_CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "cudnn": (partial(attend_causally, implementation="xla"), {"in_order": True}),
    "cudnn_window": (
        partial(attend_causally, implementation="xla"),
        {"in_order": True, "window": 5},
    ),
    "cudnn_masked": (partial(attend_masked, implementation="xla"), {"kind": "packed"}),
    "cudnn_masked_ring": (
        partial(attend_masked, implementation="xla"),
        {"kind": "cache", "window": 6, "mask": True},
    ),
}


@pytest.mark.parametrize("name", CHIP_CASES)
def test_what_cudnn_is_asked_for_equals_the_definition(name: str) -> None:
    """JAX's plain form of the same call says what is asked for; cuDNN itself needs a GPU."""
    attend, case = CHIP_CASES[name]
    arrays = _arrays(case, 0, (B, T, K, G, H, H))
    received = _runner(attend, case)(**arrays)
    differences = _differences(received, _runner(attend_explicitly, case)(**arrays))
    assert max(differences) <= 1e-5, differences


@pytest.mark.parametrize(
    "case", [{"in_order": True, "window": 40, "cap": 1.5, "sinks": True}, {"in_order": True}]
)
def test_splash_equals_the_definition_in_pallas_interpreter(case: dict[str, Any]) -> None:
    arrays = _arrays(case, 0, (1, 256, 1, 2, 128, 128))
    received = _runner(partial(attend_by_splash, interpret=True), case)(**arrays)
    expected = _runner(attend_explicitly, case)(**arrays)
    assert max(_differences(received, expected)) <= 1e-4


def _temporary_bytes(attend: Any, length: int) -> int:
    def loss(q: Any, k: Any, v: Any, positions: Any) -> Any:
        return attend(q, k, v, Mask(positions, positions), Scoring(0.125)).sum()

    x = jax.ShapeDtypeStruct((1, length, 4, 8), "float32")
    positions = jax.ShapeDtypeStruct((1, length), "int32")
    program = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(x, x, x, positions).compile()
    analysis: Any = program.memory_analysis()
    return int(analysis.temp_size_in_bytes)


def test_memory_of_blocks_grows_with_the_tokens() -> None:
    half, whole = (_temporary_bytes(attend_in_blocks, length) for length in (4096, 8192))
    assert whole < 2.2 * half
    assert whole < 4 * 8192 * 8192 * 4 / 20  # of all scores
    assert _temporary_bytes(attend_explicitly, 2048) > 4 * 2048 * 2048 * 4


LONG = AttentionFacts(
    platform="gpu",
    capability=(9, 0),
    dtype="bfloat16",
    batch_size=4,
    queries=2048,
    slots=2048,
    heads=32,
    kv_heads=8,
    head_dim=64,
    value_dim=64,
    in_order=True,
)
CPU = replace(LONG, platform="cpu", capability=(0, 0), dtype="float32")
TPU = replace(LONG, platform="tpu", capability=(0, 0))


@pytest.mark.parametrize(
    ("facts", "kernel", "reason"),
    [
        (LONG, "cudnn", "first choice"),
        (replace(LONG, window=512), "cudnn", "first choice"),
        (replace(LONG, capability=(7, 5)), "blockwise", "capability 8.0"),
        (replace(LONG, capability=(8, 0), head_dim=256, value_dim=256), "blockwise", "256"),
        (replace(LONG, head_dim=256, value_dim=256), "cudnn", ""),
        (replace(LONG, head_dim=60, value_dim=60), "blockwise", "heads have 60"),
        (replace(LONG, value_dim=128), "blockwise", "other sizes"),
        (replace(LONG, dtype="float32"), "blockwise", "half precision"),
        (replace(LONG, soft_cap=True), "blockwise", "no soft cap"),
        (replace(LONG, has_sinks=True), "blockwise", "no sinks"),
        (replace(LONG, has_slopes=True), "blockwise", "no slopes"),
        (replace(LONG, in_order=False), "cudnn_masked", "in order"),
        (replace(LONG, has_segments=True), "cudnn_masked", "segments"),
        (replace(LONG, has_mask=True), "cudnn_masked", "booleans"),
        (replace(LONG, has_positions=False, has_mask=True), "cudnn_masked", "not cudnn"),
        (replace(LONG, has_mask=True, slots=2049), "blockwise", "even numbers"),
        (replace(LONG, has_mask=True, queries=32768, slots=32768), "blockwise", "8,192 MB"),
        (replace(LONG, queries=2), "explicit", "too few"),
        (replace(LONG, queries=64, slots=64, dtype="float32"), "explicit", "half precision"),
        (TPU, "splash", "not cudnn"),
        (replace(TPU, window=100, soft_cap=True, has_sinks=True, value_dim=128), "splash", ""),
        (replace(TPU, queries=2000, slots=2000), "blockwise", "no multiple of 128"),
        (replace(TPU, has_slopes=True), "blockwise", "no slopes"),
        (replace(TPU, has_segments=True), "blockwise", "segments"),
        (replace(TPU, dtype="float32"), "blockwise", "half precision"),
        (CPU, "blockwise", "scores would take 2,048 MB"),
        (replace(CPU, batch_size=1, queries=512, slots=512), "explicit", "cpu"),
        (replace(CPU, queries=1), "explicit", ""),
        (replace(CPU, platform="other"), "explicit", ""),
    ],
)
def test_the_choice(facts: AttentionFacts, kernel: str, reason: str) -> None:
    chosen, why = choose_attention(facts)
    assert chosen.name == kernel, why
    assert reason in why


def test_a_kernel_asked_for_computes_it_or_says_why_not() -> None:
    assert choose_attention(CPU, "explicit")[0].name == "explicit"
    with pytest.raises(ValueError, match="'cudnn' cannot compute this, because it runs on GPUs"):
        choose_attention(CPU, "cudnn")
    with pytest.raises(ValueError, match="received 'flash'"):
        choose_attention(CPU, "flash")
    layer = flm.AttentionDotProduct(kernel="splash")
    x = np.ones((1, 3, 2, 4), "float32")
    with pytest.raises(ValueError, match="because it runs on TPUs"):
        layer({"query": x, "key": x, "value": x, "mask": np.ones((1, 3, 3), bool)})


def test_a_kernel_of_ones_own_is_the_first_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice_module, "_kernels", list(choice_module._kernels))

    def obstacle(facts: AttentionFacts) -> str | None:
        return "there are sinks" if facts.has_sinks else None

    def attend(query: Any, key: Any, value: Any, *others: Any) -> Any:
        return query * 0 + 7

    register_attention(AttentionKernel("sevens", obstacle, lambda facts: None, attend))
    x = jnp.ones((1, 3, 2, 4))
    inputs = {"query": x, "key": x, "value": x, "mask": np.ones((1, 3, 3), bool)}
    assert np.asarray(flm.AttentionDotProduct()(inputs)).min() == 7
    assert (
        "not sevens, because there are sinks" in choose_attention(replace(CPU, has_sinks=True))[1]
    )


def test_the_choice_is_explained(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    save_reference(CONFIGS["gemma2_soft_caps"], tmp_path)
    backbone = flm.Backbone.from_preset(str(tmp_path), load_weights=False)
    flm.explain_attention(backbone, 1, 3000)
    printed = capsys.readouterr().out
    assert "blockwise: decoder_0/attention/dot_product and " in printed
    assert "its scores would take" in printed
    choices = flm.attention_choices(backbone, 1, 12, packed=True)
    assert {choice.kernel for choice in choices} == {"explicit"}
    assert "there are segments" in choices[0].reason or "GPUs" in choices[0].reason
