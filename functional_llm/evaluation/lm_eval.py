"""A model for lm-evaluation-harness, which `pip install lm-eval` brings.

Importing this file imports the harness, and makes it know the model as `functional_llm`:

```python
import lm_eval
from functional_llm.evaluation.lm_eval import FunctionalLM

results = lm_eval.simple_evaluate(FunctionalLM(backbone, tokenizer), tasks=["arc_easy"])
```

Run as a module it is the harness's own command:
`python -m functional_llm.evaluation.lm_eval run --model functional_llm --model_args pretrained=X`.

Reference:
    [The interface of models](https://github.com/EleutherAI/lm-evaluation-harness/blob/main/docs/model_guide.md).
"""

import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import keras

from functional_llm.evaluation.perplexity import DEFAULT_WINDOW, sum_windows
from functional_llm.evaluation.rows import Row, prefix_token_id
from functional_llm.evaluation.scorer import Scorer
from functional_llm.generation import samplers
from functional_llm.generation.text_generator import TextGenerator
from functional_llm.presets.text_generator import TextGenerator as HandleGenerator
from functional_llm.tokenizers import TextTokenizer

try:
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs
except ImportError as error:
    raise ImportError(
        f"This needs lm-evaluation-harness. Received: {error}. Install it with "
        "`pip install lm-eval`."
    ) from error

_LOG = logging.getLogger(__name__)
_SAMPLER_NUMBERS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


@register_model("functional_llm")
class FunctionalLM(TemplateLM):
    """A model of this library in lm-evaluation-harness.

    Its numbers are those of the harness's own `hf` with the same weights: texts are encoded, cut on
    the left and generated in the same way.

    Args:
        pretrained: A Backbone, rewired or not, a `TextGenerator`, or a handle, which is loaded.
        tokenizer: As for `Scorer`.
        adapter: As for `TextGenerator.from_preset`, for a handle; so are the next two.
        dtype: See there.
        quantize: See there.
        batch_size: Most rows that the model reads at once; `"auto"` for as many as keep the
            processor busy.
        max_length: Most tokens that the model reads. By default its context, or 2048.
        max_gen_toks: Most tokens to write, of a task that does not say it.
        **ignored: What the harness gives to any model: `device`, `max_batch_size`.

    Raises:
        ValueError: At an unknown argument, or one that does not go with a model; else as `Scorer`.
    """

    def __init__(
        self,
        pretrained: keras.Model | TextGenerator | str | Path,
        tokenizer: TextTokenizer | None = None,
        adapter: str | Path | None = None,
        dtype: str = "float32",
        quantize: str | None = None,
        batch_size: int | str | None = "auto",
        max_length: int | None = None,
        max_gen_toks: int = 256,
        **ignored: Any,
    ) -> None:
        super().__init__()
        unknown = sorted(set(ignored) - {"device", "max_batch_size"})
        if unknown:
            raise ValueError(f"FunctionalLM knows no argument {', '.join(map(repr, unknown))}.")
        self._name = "functional_llm"
        if isinstance(pretrained, (str, Path)):
            self._name = str(pretrained).replace("/", "__")
            pretrained = HandleGenerator.from_preset(pretrained, adapter, dtype, quantize)
        elif adapter is not None or quantize is not None or dtype != "float32":
            raise ValueError(
                "Expected `adapter`, `dtype` and `quantize` with a handle only, received them with "
                "a model. Edit the model first: `flm.peft.load_adapter(backbone, adapter)`."
            )
        self._scorer = Scorer(pretrained, tokenizer)
        self.tokenizer = self._scorer.tokenizer
        self._generator = (
            pretrained
            if isinstance(pretrained, TextGenerator)
            else TextGenerator(self._scorer.backbone, self.tokenizer)
        )
        is_auto = batch_size is None or str(batch_size).startswith("auto")  # or "auto:4"
        self.batch_size = None if is_auto else int(str(batch_size))
        self.max_length = max_length or self._scorer.context or DEFAULT_WINDOW
        self.max_gen_toks = max_gen_toks

    @property
    def tokenizer_name(self) -> str:
        """What the harness calls the tokenizer, where it keeps requests."""
        return self._name

    @property
    def eot_token_id(self) -> int | None:
        """The token that ends a text."""
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """What stands in the place of an empty context."""
        return prefix_token_id(self.tokenizer)

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Returns the ids of a text; with the model's BOS, unless told otherwise."""
        with_bos = self.tokenizer.add_bos and add_special_tokens is not False
        return self.tokenizer.encode(string, with_bos, parse_special=True)

    def apply_chat_template(
        self, chat_history: Sequence[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Returns a conversation as a text, without its system message if there can be none."""

        def write(messages: Sequence[dict[str, str]]) -> str:
            return self.tokenizer.apply_chat_template(
                messages, add_generation_prompt, continue_final_message=not add_generation_prompt
            )

        try:
            return write(chat_history)
        except ValueError:
            others = [message for message in chat_history if message["role"] != "system"]
            if len(others) == len(chat_history):
                raise
            _LOG.warning("The chat template takes no system message: it is left out.")
            return write(others)

    def loglikelihood_rolling(
        self, requests: Sequence[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Returns the log-probability of each text, in windows of `max_length`."""
        # A text may begin with a BOS: the harness reads two then, and predicts the second.
        texts = [[self.prefix_token_id, *self.tok_encode(x.args[0])] for x in requests]
        window = self.max_length
        sums = sum_windows(self._scorer, texts, window, window, self.batch_size).tolist()
        for request, total in zip(requests, sums, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return sums

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        rows = []
        for names, context, continuation in requests:
            if not continuation or len(continuation) > self.max_length:
                raise ValueError(
                    f"Expected a continuation of 1 to {self.max_length} tokens, received "
                    f"{len(continuation)}: {names!r:.200}."
                )
            room = self.max_length + 1 - len(continuation)
            if len(context) > room:
                _LOG.warning("A context of %d tokens is cut to its last %d.", len(context), room)
            # No tokens: a context of nothing but white space, which the continuation got.
            rows.append(Row(context[-room:] or [self.prefix_token_id], continuation))
        scores = self._scorer.score_ids(rows, self.batch_size)
        results = [(score.log_probability, score.is_greedy) for score in scores]
        for (names, _, _), result in zip(requests, results, strict=True):
            self.cache_hook.add_partial("loglikelihood", names, result)
        return results

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Returns what the model writes after each text, up to a stop string."""
        groups: dict[str, list[int]] = {}
        rows = []
        for i, request in enumerate(requests):
            rows.append(self.tok_encode(request.args[0]))
            groups.setdefault(repr(request.args[1]), []).append(i)
        results = [""] * len(requests)
        for places in groups.values():
            places.sort(key=lambda i: -len(rows[i]))
            # A generation has a cache for each row.
            size = self.batch_size or 8
            for chosen in (places[i : i + size] for i in range(0, len(places), size)):
                settings = requests[chosen[0]].args[1]
                texts = self._generate([rows[i] for i in chosen], settings)
                for i, text in zip(chosen, texts, strict=True):
                    results[i] = text
                    self.cache_hook.add_partial("generate_until", requests[i].args, text)
        return results

    def _generate(self, rows: list[list[int]], settings: dict[str, Any]) -> Iterable[str]:
        numbers: dict[str, Any] = dict(normalize_gen_kwargs(settings, self.max_gen_toks))
        eos = self.tokenizer.token_text(self.eot_token_id)
        stop = [x for x in handle_stop_sequences(numbers.pop("until"), eos) if x]
        most = numbers.pop("max_gen_toks")
        if not 0 < most < self.max_length:
            raise ValueError(
                f"Expected max_gen_toks from 1 to below {self.max_length}, the model's context, "
                f"received {most}."
            )
        is_random = numbers.pop("do_sample", False)
        unknown = sorted(set(numbers) - set(_SAMPLER_NUMBERS))
        if unknown:
            raise ValueError(
                f"Expected generation settings of {', '.join(_SAMPLER_NUMBERS)}, do_sample, until "
                f"and max_gen_toks. Received: {', '.join(unknown)}."
            )
        if not is_random:
            numbers = {k: v for k, v in numbers.items() if k == "repetition_penalty"}
        sampler = samplers.get("random" if is_random else "greedy", **numbers)
        prompts = [row[most - self.max_length :] for row in rows]
        return self._generator.generate(prompts, most, sampler, stop)


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
