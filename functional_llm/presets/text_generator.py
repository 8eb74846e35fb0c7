"""TextGenerator: from a handle to text in one call."""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, Self, Unpack

from functional_llm.generation import samplers
from functional_llm.generation.chat import Chat
from functional_llm.generation.programs import Announce
from functional_llm.generation.samplers import SamplerNumbers
from functional_llm.generation.text_generator import SamplerOrName
from functional_llm.generation.text_generator import TextGenerator as Generator
from functional_llm.presets.adapted import (
    Adapters,
    Handle,
    split_handle,
    tokenizer_handle,
    with_adapters,
)
from functional_llm.presets.backbone import Backbone
from functional_llm.presets.tokenizer import Tokenizer


class TextGenerator(Generator):  # noqa: D101
    __doc__ = Generator.__doc__

    @classmethod
    def from_preset(
        cls,
        handle: Handle | None = None,
        adapter: Adapters = None,
        dtype: str = "float32",
        quantize: str | None = None,
        announce: Announce = nullcontext,
    ) -> Self:
        """Loads a model, its adapters and its tokenizer.

        ```python
        generator = flm.TextGenerator.from_preset("smollm2_135m_instruct")
        generator = flm.TextGenerator.from_preset("my_adapter")  # with the base that it names
        generator = flm.TextGenerator.from_preset(base, adapter={"a": 0.7, "b": 0.3})
        ```

        Args:
            handle: Of a model, as for `Backbone.from_preset`, or of an adapter alone.
            adapter: Folders of adapters (or `"hf://org/name"`): one, a list, or a dict that gives
                each a weight, by which its change is multiplied. Without `handle`, the base is the
                one that the first names.
            dtype: As for `Backbone.from_preset`.
            quantize: `"int8"` or `"int4"`, for a base of a byte a number or half of one: as of
                `flm.quantize`.
            announce: As for `TextGenerator`.

        Returns:
            A generator. Its tokenizer is the one beside the first adapter, if there is one.

        Raises:
            RuntimeError: With another backend than JAX.
            ValueError: As `Backbone.from_preset` and `flm.peft.load_adapter`; if an adapter is
                given twice, or names another base.
            FileNotFoundError: If a path has no such files.
        """
        base, folders = split_handle(handle, adapter)
        tokenizer = Tokenizer.from_preset(tokenizer_handle(base, folders))
        backbone: Any = Backbone.from_preset(base, dtype, quantize=quantize)
        return cls(with_adapters(backbone, folders), tokenizer, announce)

    def warm_up(
        self,
        prompt_tokens: int = 32,
        max_new_tokens: int = 64,
        num_rows: int = 1,
        sampler: SamplerOrName | None = None,
        **numbers: Unpack[SamplerNumbers],
    ) -> None:
        """Compiles what prompts of such a size need, so that the first of them does not wait.

        Lengths are rounded up to powers of two, as in `generate`; other numbers of a sampler, seeds
        and stops compile nothing.

        Args:
            prompt_tokens: Tokens of the longest prompt.
            max_new_tokens: As for `generate`.
            num_rows: How many prompts at once.
            sampler: As for `generate`: its kind counts.
            **numbers: As for `generate`: which of them there are counts.

        Raises:
            ValueError: As `generate`.
        """
        stops = () if self.tokenizer is None else self.tokenizer.stop_token_ids
        rows = [[0] * prompt_tokens] * num_rows
        chosen = samplers.choose(sampler, numbers)
        next(self._run(rows, max_new_tokens, chosen, stops, seed=0))

    def chat(
        self,
        system: str | None = None,
        *,
        max_new_tokens: int = 256,
        sampler: SamplerOrName | None = None,
        stop: str | Sequence[str] = (),
        seed: int | None = None,
        **numbers: Unpack[SamplerNumbers],
    ) -> Chat:
        """Returns a conversation, whose turns reuse the cache of those before.

        ```python
        chat = generator.chat("Answer in one sentence.", temperature=0.7)
        print("".join(chat.say("Why is the sky blue?")))
        ```

        Args:
            system: As for `Chat`; the others too.
            max_new_tokens: Most tokens of an answer.
            sampler: As for `generate`.
            stop: As for `generate`.
            seed: As for `generate`.
            **numbers: As for `generate`.

        Raises:
            ValueError: If the generator has no tokenizer, or sampler and numbers do not go
                together.
        """
        return Chat(
            self,
            system,
            max_new_tokens=max_new_tokens,
            sampler=sampler,
            stop=stop,
            seed=seed,
            **numbers,
        )
