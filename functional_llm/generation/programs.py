"""The compiled programs of generation: prefill, and a loop that decodes.

They run the graph that trains, cut in two at the hidden states, so that a prefill computes the head
for the last position only. Both halves share the backbone's layers.

Shapes: B rows, T tokens of a padded prompt, S cache slots, C tokens of one run of the decode loop,
V vocabulary, D model.
"""

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import keras
import numpy as np

from functional_llm.generation.equal_layers import trace_equal_layers_once
from functional_llm.generation.results import Stats
from functional_llm.generation.samplers import Sampler, needs_keys
from functional_llm.graph.placing import place_rows, to_numpy
from functional_llm.graph.precision import full_float32
from functional_llm.layers.cache import Cache, fill_cache, grow_cache, make_cache, num_slots
from functional_llm.xla.rewriter import compiler_options, optimize_for_cpu, optimize_for_gpu

Weights: TypeAlias = list[jax.Array]
Program: TypeAlias = Callable[..., Any]
Announce: TypeAlias = Callable[[str], AbstractContextManager[object]]

TOKENS_PER_RUN = 128  # C: the decode loop returns to Python after so many, if not earlier
NOT_FINITE = -2  # what a row gets in the place of a token if its logits are not finite


class Prompt(NamedTuple):
    """What a prefill reads: padded prompts, and what to begin with.

    Args:
        tokens: (B, T) int32.
        positions: (B, T) int32, -1 for padding.
        last: (B,) int32, the index of each row's last token.
        row_ids: (B, L) int32, all tokens of each row, -1 for padding; `None` if the sampler does
            not need them.
        keys: (B,) random keys, or `None` if the sampler draws nothing.
        cache: The cache of an earlier turn, or `None`.
        mask: (B, T, T) bool, False where a token must not see another, or `None`.
        step: () int32, how many tokens have been written before: other random numbers for each.
    """

    tokens: np.ndarray
    positions: np.ndarray
    last: np.ndarray
    row_ids: np.ndarray | None
    keys: jax.Array | None
    cache: Cache | None
    mask: np.ndarray | None = None
    step: np.int32 = np.int32(0)


class DecodeState(NamedTuple):
    """What one step of the decode loop hands to the next.

    Args:
        token: (B,) int32, the last token written, which is not in the cache yet.
        position: (B,) int32, its position.
        step: () int32, how many tokens have been written.
        seen: (B, V) bool, the tokens that occur in each row; `None` if the sampler does not need
            them.
        keys: (B,) random keys, or `None` if the sampler draws nothing.
        cache: The cache.
        mask: (B, T) bool, False for tokens of the prompt that no new token sees, or `None`.
    """

    token: jax.Array
    position: jax.Array
    step: jax.Array
    seen: jax.Array | None
    keys: jax.Array | None
    cache: Cache
    mask: jax.Array | None = None


def _on_devices(prompt: Prompt) -> Prompt:
    """Returns a prompt each of whose rows is where the weights that read it are."""
    if keras.distribution.distribution() is None:
        return prompt
    of_rows = ("tokens", "positions", "last", "row_ids", "mask")
    data = {name: getattr(prompt, name) for name in of_rows}
    if prompt.keys is not None:
        data["keys"] = np.asarray(jax.random.key_data(prompt.keys))
    data = place_rows(data, len(prompt.last))
    if prompt.keys is not None:
        data["keys"] = jax.random.wrap_key_data(data["keys"])
    return prompt._replace(**data)


class _Call(NamedTuple):
    """A program, and what it is to be called with.

    Args:
        key: What makes another program of it.
        function: What it computes.
        arguments: Arrays, or their shapes.
        donated: The argument whose memory it may use for its results.
    """

    key: tuple[object, ...]
    function: Program
    arguments: tuple[Any, ...]
    donated: int | tuple[int, ...] = ()

    def traceable(self) -> Program:
        """Returns what is compiled, of a form that suits the platform."""
        return optimize_for_gpu(optimize_for_cpu(self.function))

    def compile(self) -> Callable[[], Program]:
        """Traces, in this thread; returns what compiles, in any thread."""
        program = jax.jit(
            self.traceable(),
            donate_argnums=self.donated,
            compiler_options=compiler_options(),
        )
        return program.lower(*self.arguments).compile


class CompiledPrograms:
    """Prefill and decode of one model, compiled when arguments of new shapes come.

    Args:
        backbone: A functional model with the inputs and outputs of a Backbone.
        announce: Called with a few words before programs are compiled; the context that it returns
            is left when they are.
    """

    def __init__(self, backbone: keras.Model, announce: Announce = nullcontext) -> None:
        outputs = backbone.output
        kept = {"hidden": outputs["hidden"], "cache": outputs["cache"]}
        self.backbone = backbone
        self._trunk = trace_equal_layers_once(keras.Model(backbone.input, kept))
        self._head = keras.Model(outputs["hidden"], outputs["logits"])
        self._variables = backbone.variables
        self.announce = announce
        self.compiled: dict[tuple[object, ...], Program] = {}
        self.stats = Stats()

    def weights(self) -> Weights:
        """Returns the present values of the weights."""
        return [variable.value for variable in self._variables]

    def prefill(
        self,
        slots: int,
        weights: Weights,
        prompt: Prompt,
        sampler: Sampler,
        stop_ids: np.ndarray | None = None,
    ) -> tuple[jax.Array, DecodeState]:
        """Runs the prompts; returns the first token of each row and the state of the loop.

        With `stop_ids`, those of the decode loop that will follow, the loop is compiled at the same
        time: it makes no pause after the first token.
        """
        prompt = _on_devices(prompt)
        given = prompt.cache is not None, prompt.mask is not None
        row_ids = None if prompt.row_ids is None else prompt.row_ids.shape
        key = ("prefill", prompt.tokens.shape, slots, row_ids, *given)
        arguments = (weights, prompt, sampler)
        calls = [_Call(key, self._prefill_program(slots), arguments)]
        # On several devices, the first result says how the state is spread over them.
        if stop_ids is not None and len(jax.tree.leaves(weights)[0].devices()) == 1:
            state, done_B = self._state_shapes(slots, prompt), np.zeros(len(prompt.last), bool)
            calls.append(self._decode_call(weights, state, sampler, done_B, stop_ids, 1))
        with self._compiled(*calls) as program, self.stats.timed(self._phase):
            return jax.block_until_ready(program(*arguments))

    def decode(
        self,
        weights: Weights,
        state: DecodeState,
        sampler: Sampler,
        done_B: np.ndarray,
        stop_ids: np.ndarray,
        limit: int,
    ) -> tuple[np.ndarray, DecodeState]:
        """Runs the loop once, for at most `limit` tokens a row; the state is used up.

        Returns:
            The new ids (B, C), as many as were written, -1 in rows that are done, `NOT_FINITE` last
            in rows whose logits are not finite; the new state.
        """
        call = self._decode_call(weights, state, sampler, done_B, stop_ids, limit)
        with self._compiled(call) as program, self.stats.timed("decode_seconds"):
            *written, state = program(*call.arguments)
            new_BC, count = map(to_numpy, written)
            new_BC = new_BC[:, :count]
        self.stats.decode_tokens += int((new_BC >= 0).sum())
        return new_BC, state

    def decode_shapes(self, rows: int, slots: int, sampler: Sampler, stop_ids: np.ndarray) -> _Call:
        """Returns the program of `decode` with shapes, for those who only want to compile it."""
        last_B = np.zeros(rows, "int32")
        keys_B = jax.random.split(jax.random.key(0), rows) if needs_keys(sampler) else None
        row_ids = last_B[:, None] if sampler.needs_seen else None
        prompt = Prompt(last_B[:, None], last_B[:, None], last_B, row_ids, keys_B, None)
        state = self._state_shapes(slots, prompt)
        return self._decode_call(
            self.weights(), state, sampler, np.zeros(rows, bool), stop_ids, TOKENS_PER_RUN
        )

    def grow(self, cache: Cache, slots: int) -> Cache:
        """Returns the cache with more slots, copied by one program: the peak is old and new."""

        def copy(cache: Cache) -> Cache:
            return grow_cache(self.backbone, cache, slots)

        rows = next(iter(cache.values()))["positions"].shape[0]
        call = _Call(("grow", rows, num_slots(cache), slots), copy, (cache,))
        with self._compiled(call) as program, self.stats.timed(self._phase):
            return jax.block_until_ready(program(cache))

    @property
    def _phase(self) -> str:
        """Whose time it is: what comes before the first token is the prompt's."""
        return "decode_seconds" if self.stats.prefill_seconds else "prefill_seconds"

    @contextmanager
    def _compiled(self, call: _Call, *later: _Call) -> Iterator[Program]:
        """Gives the program of a call; those of later calls are compiled when the block ends."""
        # With the kind of sampler, the third argument.
        calls = {(*x.key, jax.tree.structure(x.arguments[2:3])): x for x in (call, *later)}
        first = next(iter(calls))
        missing = {key: x for key, x in calls.items() if key not in self.compiled}
        if not missing:
            yield self.compiled[first]
            return
        what = " and ".join(str(x.key[0]) for x in missing.values())
        with self.announce(what), ThreadPoolExecutor(len(missing)) as pool:
            with self.stats.timed("compile_seconds"):
                # Python traces one program while XLA compiles another.
                compiling = {key: pool.submit(x.compile()) for key, x in missing.items()}
                if first in compiling:
                    self.compiled[first] = compiling.pop(first).result()
            yield self.compiled[first]
            with self.stats.timed("compile_seconds"):
                self.compiled |= {key: program.result() for key, program in compiling.items()}

    def _decode_call(
        self,
        weights: Weights,
        state: DecodeState,
        sampler: Sampler,
        done_B: np.ndarray,
        stop_ids: np.ndarray,
        limit: int,
    ) -> _Call:
        arguments = (weights, state, sampler, done_B, stop_ids, np.int32(limit))
        masked = None if state.mask is None else state.mask.shape
        key = ("decode", done_B.shape, num_slots(state.cache), stop_ids.shape, masked)
        return _Call(key, self._decode_program, arguments, donated=1)

    def _state_shapes(self, slots: int, prompt: Prompt) -> DecodeState:
        """Returns the state that a prefill will return, shapes in the place of arrays."""
        cache = prompt.cache
        if cache is None:
            rows = len(prompt.last)
            cache = jax.eval_shape(lambda: make_cache(self.backbone, rows, slots))
        token_B, step = jnp.asarray(prompt.last), jnp.int32(1)
        seen_BV = jax.eval_shape(lambda: self._seen(prompt))
        mask_BT = None if prompt.mask is None else jnp.asarray(prompt.mask[:, 0])
        state = DecodeState(token_B, token_B, step, seen_BV, prompt.keys, cache, mask_BT)
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)

    def _seen(self, prompt: Prompt) -> jax.Array | None:
        """Returns (B, V) bool, the tokens that occur in each row, if the sampler needs them."""
        if prompt.row_ids is None:
            return None
        rows, vocabulary = len(prompt.row_ids), self.backbone.output["logits"].shape[-1]
        ids_BL = jnp.where(prompt.row_ids < 0, jnp.int32(vocabulary), prompt.row_ids)
        seen_BV = jnp.zeros((rows, vocabulary), bool)
        return seen_BV.at[jnp.arange(rows)[:, None], ids_BL].set(True, mode="drop")

    def _forward(
        self, weights: Weights, inputs: Mapping[str, Any], last_B: jax.Array | np.ndarray
    ) -> tuple[jax.Array, Cache]:
        """Runs the graph; the head at one position of each row only."""
        inputs = self.backbone.complete_inputs(inputs)
        scope = keras.StatelessScope(state_mapping=list(zip(self._variables, weights, strict=True)))
        with scope, full_float32(str(self.backbone.output["hidden"].dtype)):
            outputs = self._trunk(inputs, training=False)
            hidden_B1D = jnp.take_along_axis(outputs["hidden"], last_B[:, None, None], axis=1)
            logits_B1V = self._head(hidden_B1D, training=False)
        return logits_B1V[:, 0].astype("float32"), outputs["cache"]

    def _prefill_program(self, slots: int) -> Program:
        def prefill(
            weights: Weights, prompt: Prompt, sampler: Sampler
        ) -> tuple[jax.Array, DecodeState]:
            inputs: dict[str, Any] = {"token_ids": prompt.tokens, "positions": prompt.positions}
            if prompt.cache is not None:
                inputs["cache"] = prompt.cache
            elif "in_order" in self.backbone.input:
                inputs["in_order"] = True
            last_BT = None
            if prompt.mask is not None:
                inputs["mask"] = prompt.mask
                last_B11 = prompt.last[:, None, None]
                last_BT = jnp.take_along_axis(jnp.asarray(prompt.mask), last_B11, axis=1)[:, 0]
            logits_BV, cache = self._forward(weights, inputs, prompt.last)
            if prompt.cache is None:  # the graph returned what it keeps of the prompt's tokens
                cache = fill_cache(self.backbone, cache, slots)
            seen_BV = self._seen(prompt)
            step = jnp.asarray(prompt.step)
            token_B, seen_BV = _sample(sampler, logits_BV, prompt.keys, step, seen_BV)
            return token_B, DecodeState(
                token=token_B,
                position=jnp.max(prompt.positions, axis=1) + 1,
                step=step + 1,
                seen=seen_BV,
                keys=prompt.keys,
                cache=cache,
                mask=last_BT,
            )

        return prefill

    def _decode_program(
        self,
        weights: Weights,
        state: DecodeState,
        sampler: Sampler,
        done_B: jax.Array,
        stop_ids: jax.Array,
        limit: jax.Array,
    ) -> tuple[jax.Array, jax.Array, DecodeState]:
        """Writes up to `limit` tokens; -1 in rows that are done."""
        Loop: TypeAlias = tuple[jax.Array, jax.Array, jax.Array, DecodeState]

        def go_on(loop: Loop) -> jax.Array:
            i, _, done_B, _ = loop
            return (i < limit) & ~jnp.all(done_B)

        def write(loop: Loop) -> Loop:
            i, new_BC, done_B, state = loop
            position_B = jnp.where(done_B, jnp.int32(-1), state.position)
            inputs = {
                "token_ids": state.token[:, None],
                "positions": position_B[:, None],
                "cache": state.cache,
            }
            if state.mask is not None:
                inputs["mask"] = state.mask[:, None]
            logits_BV, cache = self._forward(weights, inputs, jnp.zeros_like(state.token))
            token_B, seen_BV = _sample(sampler, logits_BV, state.keys, state.step, state.seen)
            new_B1 = jnp.where(done_B, jnp.int32(-1), token_B)[:, None]
            new_BC = jax.lax.dynamic_update_slice(new_BC, new_B1, (jnp.int32(0), i))
            ends_B = jnp.any(token_B[:, None] == stop_ids, axis=1) | (token_B == NOT_FINITE)
            done_B = done_B | ends_B
            position_B = state.position + 1
            state = DecodeState(
                token_B, position_B, state.step + 1, seen_BV, state.keys, cache, state.mask
            )
            return i + 1, new_BC, done_B, state

        new_BC = jnp.full((done_B.shape[0], TOKENS_PER_RUN), -1, "int32")
        count, new_BC, _, state = jax.lax.while_loop(
            go_on, write, (jnp.int32(0), new_BC, done_B, state)
        )
        return new_BC, count, state


def _sample(
    sampler: Sampler,
    logits_BV: jax.Array,
    keys_B: jax.Array | None,
    step: jax.Array,
    seen_BV: jax.Array | None,
) -> tuple[jax.Array, jax.Array | None]:
    """Returns a token for each row, or `NOT_FINITE`, and the tokens seen so far with it."""
    if keys_B is not None:
        keys_B = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys_B, step)
    token_B = sampler(logits_BV, keys_B, seen_BV)
    # The maximum is NaN if a logit is. One of -inf is a token that cannot come.
    is_finite_B = jnp.isfinite(jnp.max(logits_BV, axis=1))
    token_B = jnp.where(is_finite_B, token_B, jnp.int32(NOT_FINITE))
    if seen_BV is not None:
        seen_BV = seen_BV.at[jnp.arange(token_B.shape[0]), token_B].set(True)
    return token_B, seen_BV
