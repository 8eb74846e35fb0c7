"""Wrappers: checkpoints of several models, such as one of images and one of text.

Of these, the text model is read. It is saved as the text model alone, which Transformers loads.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from functional_llm.graph.types import JSON


@dataclass(frozen=True, kw_only=True)
class Wrapper:
    """How a text model lies in a checkpoint of several models.

    Args:
        model_type: The wrapper's name in `config.json`.
        text_family: The `model_type` of a text model that does not say its own.
        text_key: The key of `config.json` with the text model's keys.
        text_defaults: Keys of the text model that files leave out, though the family's own need
            them.
        prefixes: What names of the text model's tensors begin with -> what they begin with in a
            checkpoint of the text model alone. The first that fits counts.
        ignored: Patterns of the other models' tensors.
    """

    model_type: str
    text_family: str
    text_key: str = "text_config"
    text_defaults: JSON = field(default_factory=dict)
    prefixes: Mapping[str, str]
    ignored: Sequence[str]

    def text_name(self, name: str) -> str:
        """Returns what a tensor is called in a checkpoint of the text model alone."""
        return with_other_prefix(name, self.prefixes)


def with_other_prefix(name: str, prefixes: Mapping[str, str]) -> str:
    """Returns a name with another beginning, if it begins with a key of `prefixes`."""
    prefix = next((prefix for prefix in prefixes if name.startswith(prefix)), "")
    return prefixes.get(prefix, "") + name.removeprefix(prefix)


def llava(
    model_type: str,
    text_family: str,
    parts: Sequence[str] = ("vision_tower", "multi_modal_projector"),
    **text_defaults: Any,
) -> Wrapper:
    """Returns a wrapper around a vision tower, a projector and a text model, as LLaVA's is.

    The names are those in published files, and those that Transformers has written since 4.52.

    Args:
        model_type: As for `Wrapper`.
        text_family: As for `Wrapper`.
        parts: What the other models are called.
        **text_defaults: As for `Wrapper`.
    """
    return Wrapper(
        model_type=model_type,
        text_family=text_family,
        text_defaults=text_defaults,
        prefixes={
            "model.language_model.": "model.",
            "language_model.model.": "model.",
            "language_model.lm_head.": "lm_head.",
        },
        ignored=[f"{prefix}{part}.*" for prefix in ("", "model.") for part in parts],
    )
