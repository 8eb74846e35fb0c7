"""The compiled programs of generation: prefill, and a loop that decodes.

The graph is the one that trains. It is cut in two at the hidden states, so that a prefill computes
the head for the last position only; both halves share the backbone's layers.

Shapes: B rows, T tokens of a padded prompt, S cache slots, C tokens of one run of the decode loop,
V vocabulary, D model.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import keras
import numpy as np

from functional_llm.cpu.rewriter import compiler_options, optimize_for_cpu
from functional_llm.generation.samplers import Sampler
from functional_llm.layers.attention import store
from functional_llm.layers.cache import grow_cache, make_cache, num_slots

CHUNK = 32  # C: most tokens between two looks of the host


@dataclass
class Stats:
    """Where the time of one generation went.

    Args:
        compile_seconds: Tracing and compiling, or reading the compilation cache.
        prefill_seconds: The prompt, up to the first token.
        prefill_tokens: Tokens of the prompts, without padding.
        decode_seconds: The rest.
        decode_tokens: Tokens of all rows after the first.
    """

    compile_seconds: float = 0.0
    prefill_seconds: float = 0.0
    prefill_tokens: int = 0
    decode_seconds: float = 0.0
    decode_tokens: int = 0


class Programs:
    """Prefill and decode of one model, compiled at first sight of a shape.

    Args:
        backbone: A functional model with the inputs and outputs of a Backbone.
    """

    def __init__(self, backbone: keras.Model) -> None:
        outputs = backbone.output
        kept = {"hidden": outputs["hidden"], "cache": outputs["cache"]}
        self._backbone = backbone
        self._trunk = keras.Model(backbone.input, kept)
        self._head = keras.Model(outputs["hidden"], outputs["logits"])
        self._variables = backbone.variables
        self.compiled: dict[Any, Callable[..., Any]] = {}
        self.stats = Stats()

    def values(self) -> list[Any]:
        """Returns the present values of the weights."""
        return [variable.value for variable in self._variables]

    def prefill(
        self, slots: int, values: list[Any], arguments: dict[str, Any], sampler: Any
    ) -> tuple[Any, dict[str, Any]]:
        """Runs the prompt; returns the first token of each row and the state of the loop."""
        has_cache = arguments["cache"] is not None
        key = ("prefill", arguments["tokens"].shape, slots, has_cache)
        program = self._compiled(key, self._prefill_program(slots), (), values, arguments, sampler)
        started = time.perf_counter()
        result = jax.block_until_ready(program(values, arguments, sampler))
        self.stats.prefill_seconds += time.perf_counter() - started
        return result

    def decode(
        self, values: list[Any], state: dict[str, Any], sampler: Any, *arguments: Any
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Runs the loop once; returns the new ids (B, C), as many as were written."""
        done_B, stops, _ = arguments
        key = ("decode", done_B.shape, num_slots(state["cache"]), stops.shape)
        program = self._compiled(key, self._decode_program, 1, values, state, sampler, *arguments)
        started = time.perf_counter()
        new_BC, count, state = program(values, state, sampler, *arguments)
        new_BC = np.asarray(new_BC)[:, : int(count)]
        self.stats.decode_seconds += time.perf_counter() - started
        self.stats.decode_tokens += int((new_BC >= 0).sum())
        return new_BC, state

    def grow(self, cache: Any, slots: int) -> Any:
        """Returns the cache with more slots, copied by one program: the peak is old and new."""

        def copy(cache: Any) -> Any:
            return grow_cache(self._backbone, cache, slots)

        rows = next(iter(cache.values()))["positions"].shape[0]
        program = self._compiled(("grow", rows, num_slots(cache), slots), copy, (), cache)
        started = time.perf_counter()
        grown = jax.block_until_ready(program(cache))
        # Only the cache of an earlier turn grows before the prefill.
        phase = "decode_seconds" if self.stats.prefill_seconds else "prefill_seconds"
        setattr(self.stats, phase, getattr(self.stats, phase) + time.perf_counter() - started)
        return grown

    def _compiled(
        self, key: Any, function: Callable[..., Any], donated: Any, *arguments: Any
    ) -> Callable[..., Any]:
        key = (*key, jax.tree.structure(arguments[2:3]))  # the kind of sampler
        if key not in self.compiled:
            started = time.perf_counter()
            program = jax.jit(
                optimize_for_cpu(function),
                donate_argnums=donated,
                compiler_options=compiler_options(),
            )
            lowered = program.lower(*arguments)
            self.compiled[key] = lowered.compile()
            self.stats.compile_seconds += time.perf_counter() - started
        return self.compiled[key]

    def _forward(self, values: list[Any], inputs: dict[str, Any], last_B: Any) -> tuple[Any, Any]:
        """Runs the graph; the head only at one position a row."""
        inputs = self._backbone.complete_inputs(inputs)
        with keras.StatelessScope(state_mapping=list(zip(self._variables, values, strict=True))):
            outputs = self._trunk(inputs, training=False)
            hidden_B1D = jnp.take_along_axis(outputs["hidden"], last_B[:, None, None], axis=1)
            logits_B1V = self._head(hidden_B1D, training=False)
        return logits_B1V[:, 0].astype("float32"), outputs["cache"]

    def _prefill_program(self, slots: int) -> Callable[..., Any]:
        def prefill(values: Any, arguments: dict[str, Any], sampler: Sampler) -> Any:
            tokens_BT, positions_BT = arguments["tokens"], arguments["positions"]
            inputs = {"token_ids": tokens_BT, "positions": positions_BT}
            if arguments["cache"] is not None:
                inputs["cache"] = arguments["cache"]
            logits_BV, cache = self._forward(values, inputs, arguments["last"])
            if arguments["cache"] is None:  # what the graph returned is the prompt's own tokens
                empty = make_cache(self._backbone, tokens_BT.shape[0], slots)
                cache = jax.tree.map(lambda n, c: store(n, c, positions_BT), cache, empty)
            state = {"cache": cache, "keys": arguments["keys"], "step": jnp.int32(0)}
            state["position"] = jnp.max(positions_BT, axis=1) + 1
            token_B, seen_BV = _sample(sampler, logits_BV, state, arguments["seen"])
            return token_B, {**state, "token": token_B, "seen": seen_BV, "step": jnp.int32(1)}

        return prefill

    def _decode_program(
        self, values: Any, state: Any, sampler: Any, done_B: Any, stop_ids: Any, limit: Any
    ) -> Any:
        """Writes up to `limit` tokens; -1 in rows that are done."""

        def go_on(loop: Any) -> Any:
            i, _, done_B, _ = loop
            return (i < limit) & ~jnp.all(done_B)

        def write(loop: Any) -> Any:
            i, new_BC, done_B, state = loop
            position_B = jnp.where(done_B, jnp.int32(-1), state["position"])
            inputs = {
                "token_ids": state["token"][:, None],
                "positions": position_B[:, None],
                "cache": state["cache"],
            }
            first = jnp.zeros_like(state["token"])
            logits_BV, cache = self._forward(values, inputs, first)
            token_B, seen_BV = _sample(sampler, logits_BV, state, state["seen"])
            new_BC = new_BC.at[:, i].set(jnp.where(done_B, jnp.int32(-1), token_B))
            state = {
                **state,
                "cache": cache,
                "token": token_B,
                "seen": seen_BV,
                "step": state["step"] + 1,
                "position": state["position"] + 1,
            }
            done_B = done_B | jnp.any(token_B[:, None] == stop_ids, axis=1)
            return i + 1, new_BC, done_B, state

        new_BC = jnp.full((done_B.shape[0], CHUNK), -1, "int32")
        count, new_BC, _, state = jax.lax.while_loop(
            go_on, write, (jnp.int32(0), new_BC, done_B, state)
        )
        return new_BC, count, state


def _sample(
    sampler: Sampler, logits_BV: Any, state: dict[str, Any], seen_BV: Any
) -> tuple[Any, Any]:
    """Draws a token a row, and notes it as seen."""
    keys_B = jax.vmap(jax.random.fold_in, in_axes=(0, None))(state["keys"], state["step"])
    token_B = sampler(logits_BV, keys_B, seen_BV)
    return token_B, seen_BV.at[jnp.arange(token_B.shape[0]), token_B].set(True)
