"""A tiny random model with a tokenizer of its own, in Hugging Face layout."""

import json
from pathlib import Path

import tokenizers

from configs import CONFIGS

TEXTS = [
    "The quick brown fox jumps over the lazy dog.",
    "Zwölf Boxkämpfer jagen Viktor.",
    "日本語 🙂",
]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def save_tiny(
    folder: Path, vocabulary_size: int | None = None, config: str = "llama_grouped"
) -> Path:
    """Saves a tiny Llama and a byte-level BPE tokenizer; returns the folder.

    Args:
        folder: Where to.
        vocabulary_size: Of the model, if not that of the tokenizer.
        config: Which of `CONFIGS`.
    """
    from reference import save_reference  # which needs torch, and `save_tokenizer` does not

    size = save_tokenizer(folder)
    save_reference({**CONFIGS[config], "vocab_size": vocabulary_size or size}, folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 2}))
    return folder


def save_tokenizer(folder: Path) -> int:
    """Saves a byte-level BPE tokenizer with a chat template; returns the size of its vocabulary."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<s>", "<|im_start|>", "<|im_end|>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    facts = {"bos_token": "<s>", "eos_token": "<|im_end|>", "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(facts))
    return tokenizer.get_vocab_size()
