"""Model cards: the README.md of a directory or an adapter, for people and for the Hub.

A card that this library wrote is written anew as long as nobody has changed it; any other stays.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

CARD_NAME = "README.md"
_WORDS = "written by functional_llm, which replaces it while unchanged"
_MARK = re.compile(rf"<!-- {_WORDS}: (\w+) -->\n")
_LOADING = "## How to load it"
# What the Hub knows by name; any other licence is "other" there.
_LICENCES = {
    *("apache-2.0", "mit", "cc-by-nc-4.0", "cc-by-sa-4.0", "gemma", "llama2", "llama3"),
    *("llama3.1", "llama3.2", "llama3.3", "bigscience-bloom-rail-1.0", "bigcode-openrail-m"),
}
_REPOSITORY = re.compile(r"[\w-][\w.-]*/[\w.-]+")


@dataclass(frozen=True, kw_only=True)
class CardFacts:
    """What a card says that the weights do not tell.

    Args:
        datasets: What it was trained on: names of the Hub, or of files.
        method: How, in a sentence or more.
        losses: A name, such as `"held out"` -> a loss a token, in nats.
    """

    datasets: Sequence[str] = ()
    method: str = ""
    losses: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class ModelCard:
    """The card of a model, or of an adapter.

    Args:
        name: What the snippets load: the name of the folder.
        base: The model that it was made of: an id of the Hub, or a path.
        licence: Of the base.
        adapter: Words for the kind of adapter: `"LoRA, rank 8"`; `None` for a model.
        stock_file: Name of the `.keras` file in the folder, if the model is one.
        is_peft: Whether PEFT knows the adapter.
        facts: What else there is to say.
        tags: Of the Hub, beside `functional_llm`.
    """

    name: str
    base: str | None = None
    licence: str | None = None
    adapter: str | None = None
    stock_file: str | None = None
    is_peft: bool = True
    facts: CardFacts = field(default_factory=CardFacts)
    tags: Sequence[str] = ()

    def text(self) -> str:
        """Returns the README.md."""
        parts = [self._head(), f"# {self.name}", self._introduction()]
        if self.facts.method or self.facts.datasets:
            data = ", ".join(self.facts.datasets)
            parts += ["## How it was made", self.facts.method, f"Data: {data}." if data else ""]
        parts += [_table(self.facts.losses), _LOADING]
        for words, code in _snippets(self) if self.stock_file is None else _of_stock_file(self):
            parts += [f"{words}:", f"```python\n{code}```"]
        return _signed("\n\n".join(part for part in parts if part) + "\n\n")

    @property
    def _hub_base(self) -> str | None:
        is_id = self.base is not None and _REPOSITORY.fullmatch(self.base)
        return self.base if is_id and not Path(str(self.base)).exists() else None

    def _head(self) -> str:
        base = self._hub_base
        is_trained = self.facts != CardFacts()
        relation = "adapter" if self.adapter else "finetune" if is_trained else None
        known = self.licence in _LICENCES
        library = "peft" if self.adapter is not None and self.is_peft else None
        if self.adapter is None:
            library = "transformers" if self.stock_file is None else "keras"
        tags = ["functional_llm", "keras", *self.tags]
        if base and library == "peft":
            tags.append(f"base_model:adapter:{base}")
        datasets = [x for x in self.facts.datasets if _REPOSITORY.fullmatch(x)]
        entries = {
            "base_model": base,
            "base_model_relation": relation
            if base and (self.adapter or self.facts.method)
            else None,
            "license": (self.licence if known else "other") if self.licence else None,
            "license_name": None if known else self.licence,
            "library_name": library,
            "pipeline_tag": "text-generation" if library else None,
            "datasets": [x for x in datasets if not Path(x).exists()] or None,
            "tags": tags,
        }
        lines = [f"{key}: {json.dumps(x)}" for key, x in entries.items() if x is not None]
        return "\n".join(["---", *lines, "---"])

    def _introduction(self) -> str:
        kind = "A language model" if self.adapter is None else f"An adapter ({self.adapter})"
        of = ""
        if self._hub_base:
            of = f" of [{self.base}](https://huggingface.co/{self.base})"
        elif self.base:
            of = f" of {Path(self.base).name}"
        return f"{kind}{of}, made with functional_llm: Keras 3 on JAX."


def _snippets(card: ModelCard) -> list[tuple[str, str]]:
    """Returns words and code for each library that can load it."""
    name = json.dumps(card.name)
    here = f"import functional_llm as flm\n\ngenerator = flm.TextGenerator.from_preset({name})\n"
    here += 'print(generator.generate("Once upon a time", max_new_tokens=8))\n'
    load = f"backbone = flm.Backbone.from_preset({name})\n"
    if card.adapter is not None:
        load += "backbone = flm.peft.merge(backbone)\n"
    stock = "import functional_llm as flm  # once\n\n" + load + 'backbone.save("model.keras")\n'
    stock_2 = "import keras\n\n" + 'model = keras.saving.load_model("model.keras")\n'
    pairs = [("With functional_llm", here)]
    auto = "model = AutoModelForCausalLM.from_pretrained({})\n"
    if card.adapter is None:
        head = "from transformers import AutoModelForCausalLM\n\n" + auto.format(name)
        peft = 'config = LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear")\n'
        peft += "model = get_peft_model(model, config)\n"
        pairs += [("With Transformers", head)]
        imports = "from peft import LoraConfig, get_peft_model\n"
        pairs += [("With PEFT, to train an adapter on it", imports + head + peft)]
    elif card.is_peft and card.base:
        peft = "from peft import AutoPeftModelForCausalLM\n\n"
        peft += f"model = AutoPeftModelForCausalLM.from_pretrained({name})\n"
        head = "from transformers import AutoModelForCausalLM  # which needs PEFT for this\n\n"
        pairs += [("With PEFT", peft), ("With Transformers", head + auto.format(name))]
    else:
        head = "import functional_llm as flm  # once\n\n" + load
        head += 'backbone.save_preset("merged")\n'
        there = "from transformers import AutoModelForCausalLM\n\n" + auto.format('"merged"')
        pairs += [("With Transformers, as a merged model", head), ("and then", there)]
    return [*pairs, ("With Keras alone, on any backend", stock), ("and then, anywhere", stock_2)]


def _of_stock_file(card: ModelCard) -> list[tuple[str, str]]:
    """Returns words and code for each library that can load a `.keras` file."""
    name = json.dumps(f"{card.name}/{card.stock_file}")
    here = f"import functional_llm as flm\n\ngenerator = flm.TextGenerator.from_preset({name})\n"
    here += 'print(generator.generate("Once upon a time", max_new_tokens=8))\n'
    keras = f"import keras\n\nmodel = keras.saving.load_model({name})\n"
    directory = "import functional_llm as flm  # once\n\n"
    directory += f'flm.Backbone.from_preset({name}).save_preset("directory")\n'
    there = "from transformers import AutoModelForCausalLM\n\n"
    there += 'model = AutoModelForCausalLM.from_pretrained("directory")\n'
    return [
        ("With functional_llm", here),
        ("With Transformers, as a directory", directory),
        ("and then", there),
        ("With Keras alone, on any backend", keras),
    ]


def _table(losses: Mapping[str, float]) -> str:
    rows = [f"| {name} | {loss:.4f} |" for name, loss in losses.items()]
    return "\n".join(["| loss | nats a token |", "|---|---|", *rows]) if rows else ""


def add_losses(folder: Path, losses: Mapping[str, float]) -> None:
    """Adds losses to a card that this library wrote, in a folder; changes no other card."""
    path = folder / CARD_NAME
    text = path.read_text("utf-8", errors="replace") if path.is_file() else ""
    if losses and is_own(text):
        new = _MARK.sub("", text).replace(_LOADING, f"{_table(losses)}\n\n{_LOADING}")
        path.write_text(_signed(new), encoding="utf-8")


def write_card(card: ModelCard, folder: Path, beside: Path | None = None) -> None:
    """Writes a card, unless there is one that this library did not write, or that was changed.

    Args:
        card: The card.
        folder: Where it belongs.
        beside: The folder to write to, whose files will move into `folder`; `folder` itself unless
            given.
    """
    path = folder / CARD_NAME
    if not path.exists() or is_own(path.read_text("utf-8", errors="replace")):
        ((beside or folder) / CARD_NAME).write_text(card.text(), encoding="utf-8")


def is_own(text: str) -> bool:
    """Whether this library has written a card, and nobody has changed it since."""
    mark = _MARK.search(text)
    return mark is not None and mark[1] == _digest(_MARK.sub("", text))


def for_repository(text: str, repository: str) -> str:
    """Returns an own card as of a repository of the Hub; another card as it is."""
    if not is_own(text):
        return text
    old = re.search(r"^# (.*)$", text, re.M)
    name = json.dumps(old[1]) if old else ""
    text = _MARK.sub("", text)
    text = text.replace(f"from_preset({name})", f"from_preset({json.dumps(f'hf://{repository}')})")
    text = text.replace(f"from_pretrained({name})", f"from_pretrained({json.dumps(repository)})")
    text = re.sub(r"^# .*$", f"# {repository.partition('/')[2]}", text, count=1, flags=re.M)
    return _signed(text)


def _signed(text: str) -> str:
    return f"{text}<!-- {_WORDS}: {_digest(text)} -->\n"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
