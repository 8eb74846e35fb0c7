"""A tokenizer called as one of Transformers is."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from functional_llm.tokenizers.engines import Engine


class Encoding(dict[str, Any]):
    """`input_ids` and `attention_mask`, also as attributes."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"Expected one of {', '.join(self)}, received {name}.") from None


class CalledAsTransformers:
    """What `tokenizer(text)` and `len(tokenizer)` are."""

    engine: Engine
    bos_token_id: int | None
    eos_token_id: int | None
    pad_token_id: int | None
    add_bos: bool

    def __call__(
        self,
        text: str | Sequence[str],
        *,
        add_special_tokens: bool = True,
        padding: bool = False,
        return_tensors: str | None = None,
    ) -> Encoding:
        """Encodes one text or several, as `AutoTokenizer` of Transformers does.

        Other than `encode`, which takes a text as plain text, this takes the names of special
        tokens ("<|im_end|>") for these tokens, and puts BOS first if the model was trained with it:
        before a BOS in the text, too.

        Args:
            text: A text, or a list of them.
            add_special_tokens: Whether to put BOS first.
            padding: Whether to pad to the longest text, on the right; `attention_mask` is 0 there.
            return_tensors: `"np"` for NumPy arrays (B, T); lists by default.

        Returns:
            A dict with `input_ids` and `attention_mask`: a list each, or lists for several texts.

        Raises:
            ValueError: If a text is not a valid string, or arrays would not be rectangular.
        """
        if return_tensors not in (None, "np"):
            raise ValueError(
                f"Expected return_tensors to be 'np' or None, received {return_tensors!r}. "
                "Other libraries make their tensors of arrays."
            )
        is_single = isinstance(text, str)
        texts = [text] if isinstance(text, str) else list(text)
        rows = [self.encode(x, parse_special=True) for x in texts]  # type: ignore[attr-defined]
        if add_special_tokens and self.add_bos:
            rows = [[self.bos_token_id, *row] for row in rows]
        masks = [[1] * len(row) for row in rows]
        if padding:
            known = (x for x in (self.pad_token_id, self.eos_token_id, 0) if x is not None)
            pad, length = next(known), max(map(len, rows), default=0)
            masks = [mask + [0] * (length - len(mask)) for mask in masks]
            rows = [row + [pad] * (length - len(row)) for row in rows]
        if return_tensors is None:
            ids, mask = (x[0] if is_single else x for x in (rows, masks))
            return Encoding(input_ids=ids, attention_mask=mask)
        if len({len(row) for row in rows}) > 1:
            raise ValueError(
                f"Expected texts of one length for arrays, received {[len(x) for x in rows][:8]} "
                "tokens. Pass padding=True."
            )
        return Encoding(input_ids=np.array(rows, "int64"), attention_mask=np.array(masks, "int64"))

    def __len__(self) -> int:
        """How many tokens there are; ids may have gaps (see `vocabulary_size`)."""
        return self.engine.num_tokens
