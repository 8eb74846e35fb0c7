"""Decoding as it is compiled for GPUs: the same numbers, on the machine at hand.

The rules for GPUs rewrite traced programs, which any device can run. What a GPU's compiler makes of
them, `python -m benchmarks.gpu_programs` counts.
"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import functional_llm as flm
from configs import CONFIGS
from functional_llm.generation.run import make_prompt
from functional_llm.xla.gpu_rules import GPU_RULES
from functional_llm.xla.rewriter import optimize_for_gpu
from reference import save_reference

# Full attention; a ring that wraps while it is written; both, with one key head for several.
MODELS = ("llama_grouped", "mistral_window", "gemma2_soft_caps")
NUM_NEW = 14


@pytest.fixture
def as_on_gpus(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Programs are rewritten as for GPUs; returns the names of the rules that have matched."""
    used: set[str] = set()
    for rule in GPU_RULES:
        _note(monkeypatch, type(rule), used)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    return used


def _note(monkeypatch: pytest.MonkeyPatch, cls: Any, used: set[str]) -> None:
    rewrite = cls.rewrite

    def noted(self: Any, *arguments: Any) -> Any:
        used.add(self.name)
        return rewrite(self, *arguments)

    monkeypatch.setattr(cls, "rewrite", noted)


def _load(name: str, folder: Path) -> Any:
    save_reference(CONFIGS[name], folder)
    return flm.Backbone.from_preset(str(folder))


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("name", MODELS)
def test_the_same_text_is_written(
    name: str, rows: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, as_on_gpus: set[str]
) -> None:
    backbone = _load(name, tmp_path)
    prompts = [[5, 6, 7, 8, 9, 10, 11], [3], [40, 41]][:rows]

    def write() -> Any:
        return flm.TextGenerator(backbone, None).generate_ids(prompts, max_new_tokens=NUM_NEW)

    rewritten = write()
    expected = {"loop_order", "product_of_reordered"} | (
        {"one_row_written"} if rows == 1 else {"rows_scattered"}
    )
    assert expected <= as_on_gpus
    monkeypatch.undo()
    assert rewritten == write()


def test_one_row_of_half_floats_is_multiplied_as_before(as_on_gpus: set[str]) -> None:
    rng = np.random.default_rng(0)
    x, y = (jnp.asarray(rng.normal(size=size), "bfloat16") for size in ((1, 1, 256), (256, 128)))

    def multiply(x: Any, y: Any) -> Any:
        return jnp.einsum("btd,df->btf", x, y)

    rewritten = jax.jit(optimize_for_gpu(multiply))(x, y)
    assert as_on_gpus == {"half_row"}
    np.testing.assert_array_equal(rewritten, multiply(x, y))


def _keys(rows: int) -> Any:
    return jax.random.split(jax.random.key(0), rows)


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_rows_that_have_ended_keep_their_cache(
    platform: str, rows: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = _load("mistral_window", tmp_path)
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    generator = flm.TextGenerator(backbone, None)
    programs, weights = generator._programs, generator._programs.weights()
    sampler = flm.samplers.get("greedy")
    ids = [[7] * 9, [3] * 12][:rows]
    slots = 256
    prompt = make_prompt(ids, slots, sampler, _keys(rows))
    no_stop = np.full(1, -1, "int32")
    _, state = programs.prefill(slots, weights, prompt, sampler)
    before = jax.tree.map(lambda x: np.array(x[0]), state.cache)
    done_B = np.arange(rows) == 0
    _, state = programs.decode(weights, state, sampler, done_B, no_stop, 5)
    after = jax.tree.map(lambda x: np.array(x[0]), state.cache)
    jax.tree.map(np.testing.assert_array_equal, before, after)
    if rows == 2:  # the other row has gone on
        (group,) = state.cache.values()
        assert int(group["positions"][1].max()) == 12 + 5 - 1


def test_greedy_carries_no_state_of_samplers(tmp_path: Path) -> None:
    backbone = _load("llama_grouped", tmp_path)
    vocabulary = backbone.output["logits"].shape[-1]
    generator = flm.TextGenerator(backbone, None)
    sampler = flm.samplers.get("greedy")
    call = generator._programs.decode_shapes(2, 64, sampler, np.full(1, -1, "int32"))
    state: Any = call.arguments[1]
    assert state.seen is None and state.keys is None
    assert all(vocabulary not in x.shape for x in jax.tree.leaves(state))


def test_prompts_carry_ids_and_no_row_of_the_vocabulary(tmp_path: Path) -> None:
    backbone = _load("llama_grouped", tmp_path)
    vocabulary = backbone.output["logits"].shape[-1]
    sampler = flm.samplers.get("random", repetition_penalty=1.3)
    prompt = make_prompt([[1, 2]], 256, sampler, _keys(1))
    assert prompt.row_ids is not None
    assert all(vocabulary not in np.shape(x) for x in jax.tree.leaves(prompt))
