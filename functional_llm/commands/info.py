"""`info`: what a model is, before its weights are loaded."""

import argparse
import math
from contextlib import suppress
from typing import Any

from functional_llm.commands.command import Command
from functional_llm.commands.options import DEFAULT_PRESET, HANDLES, QUANTIZED, add_precision

_CONFIG_WORDS = {
    "num_layers": "layers",
    "hidden_dim": "width",
    "intermediate_dim": "mlp width",
    "num_query_heads": "query heads",
    "num_key_value_heads": "key and value heads",
    "head_dim": "head size",
    "vocabulary_size": "vocabulary",
}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of describing a model."""
    words = f"{HANDLES}, or an adapter (%(default)s)"
    parser.add_argument("model", metavar="MODEL", nargs="?", default=DEFAULT_PRESET, help=words)
    add_precision(parser, quantize=False)


def run(arguments: argparse.Namespace) -> None:
    """Builds the graph without weights, and prints what there is to say of it."""
    from functional_llm.layers.explaining import explain_attention
    from functional_llm.presets.adapted import split_handle
    from functional_llm.presets.backbone import without_values

    base, adapters = split_handle(arguments.model)
    for folder in adapters:
        _print_rows(_adapter_rows(folder, str(base)))
        print()
    _print_rows(_source_rows(str(base)))
    backbone = without_values(base, arguments.dtype)
    _print_rows(_size_rows(backbone))
    print()
    tokens = min(2048, backbone.config.max_sequence_length)
    explain_attention(backbone, 1, tokens)


def _source_rows(handle: str) -> list[tuple[str, str]]:
    """Returns what the handle's files say: family, licence, numbers."""
    from functional_llm.presets.family_table import list_families
    from functional_llm.presets.sources import read_numbers
    from functional_llm.presets.table import preset_names, read_preset

    family, config, edits = read_numbers(handle)
    row = next(row for row in list_families() if row["family"] == family.model_type)
    rows = [("model", handle)]
    if handle in preset_names():
        preset = read_preset(handle)
        source = preset["source"]
        rows += [("", preset["description"]), ("licence", preset["licence"])]
        rows += [("source", f"hf://{source['hub']}" if "hub" in source else source["wheel"])]
    rows += [("family", f"{family.model_type} ({row['models']})")]
    rows += [("reads", row["reads"]), ("writes", f"{row['writes']}, stock .keras files")]
    sizes = {words: getattr(config, name, None) for name, words in _CONFIG_WORDS.items()}
    rows += [("sizes", ", ".join(f"{x:,} {name}" for name, x in sizes.items() if x is not None))]
    rows += [("context", f"{config.max_sequence_length:,} tokens")]
    if edits.quantized:
        modes = ", ".join(sorted(set(edits.quantized.values())))
        rows += [("quantised", f"{len(edits.quantized)} layers, in {modes}")]
    if edits.adapters:
        rows += [("adapters", ", ".join(x["adapter_name"] for x in edits.adapters))]
    return rows


def _size_rows(backbone: Any) -> list[tuple[str, str]]:
    """Returns the memory of weights and cache, by dtype."""
    from functional_llm.edits.quantization import quantized_bytes
    from functional_llm.layers.cache import token_sizes

    count = sum(math.prod(v.shape) for v in backbone.variables)
    memory = {"float32": 4 * count, "bfloat16": 2 * count}
    for mode in QUANTIZED:
        with suppress(ValueError):  # what cannot be quantised, or is already
            memory[f"{mode} (with bfloat16)"] = quantized_bytes(backbone, mode, 2)
    context = backbone.config.max_sequence_length
    token, whole = (token_sizes(backbone, n) for n in (1, context))
    dtype = backbone.product_dtype
    return [
        ("parameters", f"{count:,}"),
        ("memory", ", ".join(f"{name} {amount(x)}" for name, x in memory.items())),
        ("cache", f"{amount(token)} a token, {amount(whole)} for the whole context ({dtype})"),
    ]


def _adapter_rows(folder: Any, base: str) -> list[tuple[str, str]]:
    from functional_llm.files.json_files import read_json

    config = read_json(folder / "adapter_config.json")
    targets = config.get("target_modules") or sorted(config.get("layers", ()))
    shown = targets if isinstance(targets, str) else ", ".join(targets[:8])
    rank = f", rank {config['r']}, alpha {config.get('lora_alpha'):g}" if "r" in config else ""
    return [
        ("adapter", str(folder)),
        ("method", f"{config.get('peft_type')}{rank}"),
        ("targets", shown + (", ..." if len(targets) > 8 and shown != targets else "")),
        ("base", base),
    ]


def amount(size: float) -> str:
    """Returns a number of bytes for people: 46.1 kB, 538 MB."""
    for unit in ("bytes", "kB", "MB"):
        if size < 999.5:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:,.0f} GB" if size >= 999.5 else f"{size:.3g} GB"


def _print_rows(rows: list[tuple[str, str]]) -> None:
    for name, value in rows:
        print(f"{name:>12}  {value}")


COMMAND = Command(
    description="Shows what a model is: family, sizes, formats, memory, attention on this machine.",
    add_options=add_options,
    run=run,
)
