"""Writes preset directories of KerasHub: the model, its tokenizer, the task that uses both."""

import json
import warnings
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from functional_llm.backbones.keras_hub.column import KerasHub
from functional_llm.files.json_files import read_json, write_json
from functional_llm.files.replacing import replaced_folder
from functional_llm.formats.keras_hub_config import make_arguments
from functional_llm.presets.backbone import Backbone
from functional_llm.presets.keras_hub import to_keras_hub
from functional_llm.presets.tokenizer import Tokenizer
from functional_llm.tokenizers import TextTokenizer
from functional_llm.tokenizers.engines import TokenizersEngine
from functional_llm.tokenizers.keras_hub_vocabulary import KINDS
from functional_llm.tokenizers.longest_match import FILE_NAME, LongestMatchEngine
from functional_llm.tokenizers.sentencepiece_engine import SentencePieceEngine
from functional_llm.tokenizers.sentencepiece_model import (
    CONTROL,
    UNKNOWN,
    USER_DEFINED,
    merges_proto,
    with_pieces,
)

# What is not there for every model, and weights, which may lie in several files.
_FILES = ("task.json", "preprocessor.json", "tokenizer.json", "*.weights.h5", "*.weights.json")
# What the classes of tokenizers want beside their vocabulary.
_ARGUMENTS: dict[str, dict[str, Any]] = {
    "Gemma3Tokenizer": {"has_vision_tokens": False},
    "Gemma4Tokenizer": {"has_vision_tokens": False, "has_video_tokens": False},
}


def save_keras_hub_preset(
    backbone: Backbone, directory: str | Path, tokenizer: TextTokenizer | None = None
) -> None:
    """Writes a directory that `keras_hub.models.CausalLM.from_preset` loads, with its tokenizer.

    Args:
        backbone: As for `to_keras_hub`.
        directory: Where to write; replaced when all is there.
        tokenizer: Defaults to that of the preset that the backbone was loaded from, if there is
            one; with none, or with RWKV's, of which a warning tells, the preset has the model only.

    Raises:
        ImportError: As `to_keras_hub`.
        ValueError: As `to_keras_hub` and `to_keras_hub_tokenizer`.
    """
    family = backbone.check_preset()
    arguments, column = make_arguments(backbone.config, family), family.keras_hub
    if tokenizer is None and backbone.preset is not None:
        with suppress(FileNotFoundError):
            tokenizer = Tokenizer.from_preset(backbone.preset)
    if tokenizer is not None and isinstance(tokenizer.engine, LongestMatchEngine):
        warnings.warn(
            "The preset has no tokenizer: KerasHub's RWKVTokenizer is not written. Make one of the "
            f"model's {FILE_NAME}, and save it into the same directory.",
            stacklevel=2,
        )
        tokenizer = None
    name = None if column is None else _class_of(column, tokenizer)
    hub: Any = to_keras_hub(backbone, name)
    kind = type(hub).__name__.removesuffix("Backbone")
    hub_tokenizer = None if tokenizer is None else to_keras_hub_tokenizer(tokenizer, kind)
    with replaced_folder(Path(directory), stale=_FILES) as folder:
        if tokenizer is None or type(hub_tokenizer).__name__ not in KINDS:
            hub.save_to_preset(str(folder))
            if hub_tokenizer is not None:
                hub_tokenizer.save_to_preset(str(folder))
        else:
            import keras_hub

            preprocessor = getattr(keras_hub.models, f"{kind}CausalLMPreprocessor")(
                hub_tokenizer, add_start_token=tokenizer.add_bos
            )
            make = getattr(keras_hub.models, f"{kind}CausalLM")
            task = make(backbone=hub, preprocessor=preprocessor)  # Gemma's order is another
            task.save_to_preset(str(folder))
        _complete(folder, arguments)


def to_keras_hub_tokenizer(tokenizer: TextTokenizer, kind: str) -> Any:
    """Returns KerasHub's tokenizer of ours: the same ids, for text that it cuts into words rightly.

    A class knows the texts of its special tokens, which a preset cannot say. If the model's own
    class has others, a class that has these is taken: SmolLM2 is a Llama with Qwen's tokens. If
    there is none, a warning says so: it is a tokenizer without special tokens then.

    Args:
        tokenizer: Of byte pairs or sentencepiece.
        kind: What the names of KerasHub's classes for the model begin with: `"Llama3"`.

    Raises:
        ValueError: If the vocabulary is of another kind.
    """
    from keras_hub import tokenizers as hub

    eos = tokenizer.token_text(tokenizer.eos_token_id)
    for name in _candidates(tokenizer, kind):
        with suppress(ValueError):  # a special token is not in the vocabulary
            arguments = {**_vocabulary(tokenizer, name), **_ARGUMENTS.get(name, {})}
            made = getattr(hub, name)(**arguments)
            if eos in (made.end_token, *KINDS[name].stops):
                return made
    name = "SentencePieceTokenizer" if _is_sentences(tokenizer) else "BytePairTokenizer"
    warnings.warn(
        f"No class of KerasHub's is a {kind} tokenizer whose texts end with {eos!r}. A {name} is "
        "written, which gives the same ids. The `generate` of KerasHub's task needs another: give "
        "it ids.",
        stacklevel=2,
    )
    return getattr(hub, name)(**_vocabulary(tokenizer, name))


def _class_of(column: KerasHub, tokenizer: TextTokenizer | None) -> str:
    """Returns the name of the backbone's class: of Llama's two, the one with such a tokenizer."""
    if tokenizer is not None:
        for name in column.classes:
            own = KINDS.get(name.replace("Backbone", "Tokenizer"))
            if own is not None and (own.pre is None) == _is_sentences(tokenizer):
                return name
    return column.classes[0]


def _state(tokenizer: TextTokenizer) -> Any:
    """Returns what `tokenizer.json` says of a tokenizer of the library tokenizers."""
    engine = tokenizer.engine
    return json.loads(engine.tokenizer.to_str()) if isinstance(engine, TokenizersEngine) else {}


def _is_sentences(tokenizer: TextTokenizer) -> bool:
    if isinstance(tokenizer.engine, SentencePieceEngine):
        return True
    return bool(_state(tokenizer).get("model", {}).get("byte_fallback"))


def _candidates(tokenizer: TextTokenizer, kind: str) -> Iterator[str]:
    """Yields names of classes: the model's own, then those with the same special tokens."""
    own = [f"{kind}Tokenizer", f"{kind}TekkenTokenizer"]
    eos = tokenizer.token_text(tokenizer.eos_token_id)
    bos = tokenizer.token_text(tokenizer.bos_token_id) if tokenizer.add_bos else None
    others = [x for x, facts in KINDS.items() if (facts.bos, facts.eos) == (bos, eos)]
    for name in dict.fromkeys([*own, *others]):
        if name in KINDS and (KINDS[name].pre is None) == _is_sentences(tokenizer):
            yield name


def _vocabulary(tokenizer: TextTokenizer, name: str) -> dict[str, Any]:
    """Returns the arguments of a class that say what tokens there are.

    Raises:
        ValueError: If they cannot say it.
    """
    if isinstance(tokenizer.engine, SentencePieceEngine):
        return {"proto": with_pieces(tokenizer.engine.proto, tokenizer.engine.added)}
    state = _state(tokenizer)
    model = state.get("model", {})
    if model.get("type") != "BPE":
        raise ValueError(
            "Expected a vocabulary of byte pairs or of sentencepiece, which KerasHub's tokenizers "
            f"have. Received: {model.get('type', type(tokenizer.engine).__name__)}."
        )
    pairs = [x if isinstance(x, str) else " ".join(x) for x in model["merges"]]
    added = {x["content"]: x["id"] for x in state["added_tokens"]}
    if model.get("byte_fallback"):
        ends = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}
        kinds = {x: CONTROL if i in ends else USER_DEFINED for x, i in added.items()}
        kinds |= {model["unk_token"]: UNKNOWN} if model["unk_token"] else {}
        ids = {**model["vocab"], **added}
        return {"proto": merges_proto(ids, kinds, pairs, tokenizer.engine.adds_space)}
    arguments = {"vocabulary": {**model["vocab"], **added}, "merges": pairs}
    if name == "MistralTekkenTokenizer":  # whose special tokens are the class's
        return arguments | {"split_pattern": _pattern(state["pre_tokenizer"])}
    return arguments | {"unsplittable_tokens": list(added)}


def _pattern(pre_tokenizer: Any) -> str:
    for part in (pre_tokenizer or {}).get("pretokenizers", ()):
        if part["type"] == "Split" and "Regex" in part["pattern"]:
            return str(part["pattern"]["Regex"])
    raise ValueError("there is no expression that cuts text into words.")


def _complete(folder: Path, arguments: dict[str, Any]) -> None:
    """Adds arguments that KerasHub's classes leave out of their configs: whether Llama is tied."""
    for name in ("config.json", "task.json"):
        if (folder / name).is_file():
            raw = read_json(folder / name)
            config = raw["config"] if name == "config.json" else raw["config"]["backbone"]["config"]
            plain = {key: x for key, x in arguments.items() if isinstance(x, (bool, int, float))}
            missing = {key: x for key, x in plain.items() if key not in config}
            if missing:
                config.update(missing)
                write_json(folder / name, raw)
