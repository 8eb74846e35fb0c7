"""The options of a fine-tuning, and what they describe.

Importing this file imports nothing of JAX, as that of `options`.
"""

import argparse
from collections.abc import Callable
from dataclasses import fields
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from functional_llm.commands.options import (
    DTYPES,
    QUANTIZED,
    above_zero,
    add_adapters,
    add_mesh,
    add_preset,
    check_model,
    not_negative,
    positive,
    share,
    whole,
)

if TYPE_CHECKING:
    from functional_llm.formats.model_card import CardFacts
    from functional_llm.presets import Backbone, Tokenizer
    from functional_llm.training import Rows, Settings, StreamedRows

METHODS = ("lora", "dora", "svf", "ia3", "bitfit", "full")
REMAT = ("nothing", "products", "layer")
STOPPING_STRATEGIES = ("first_exhausted", "all_exhausted", "all_exhausted_without_replacement")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of a fine-tuning."""
    add = partial(_add_with_default, parser)
    add_preset(parser)
    _add_data(add)
    add("--output", type=Path, required=True, help="directory for the result")
    add("--save", choices=["adapter", "merged", "keras"], help="(merged for full, else adapter)")
    add("--resume", action="store_true", help="go on from the checkpoint in the output directory")
    add("--method", choices=METHODS, help="what is trained (lora, or what --adapter is)")
    add_adapters(parser)
    add("--rank", type=positive, default=8, help="of LoRA and DoRA")
    add("--alpha", type=above_zero, default=16.0, help="of LoRA and DoRA")
    add("--dropout", type=share, default=0.0, help="of LoRA and DoRA")
    targets = "layers by name or path: query decoder_*/mlp/*; or all (what is usual for the method)"
    add("--targets", nargs="+", metavar="TARGET", help=targets)
    add("--dtype", choices=DTYPES, default="float32", help="of the model's numbers")
    below = "the model under the adapter takes a byte a number, or half of one"
    add("--quantize", choices=QUANTIZED, help=below)
    add_mesh(parser)
    add("--length", type=positive, default=512, help="tokens of a row; longer examples are cut")
    add("--no-packing", dest="packing", action="store_false", help="an example a row")
    small = "3; more of small data, for at least 60 steps"
    add(
        "--epochs", type=above_zero, help=f"passes over the data, unless --steps is given ({small})"
    )
    add("--steps", type=positive, help="updates of the weights")
    add("--batch-size", type=positive, help="rows of a batch (4, or fewer of small data)")
    add("--accumulate", type=positive, default=1, help="batches that make one step")
    add("--learning-rate", type=above_zero, default=1e-3, help="the highest")
    add("--schedule", choices=["cosine", "linear", "constant"], default="cosine", help="its course")
    add("--warmup-steps", type=whole, default=0, help="steps in which the learning rate rises")
    add("--weight-decay", type=not_negative, default=0.0, help="of AdamW")
    add("--clip-norm", type=not_negative, default=1.0, help="longest gradient; 0 for no limit")
    add("--seed", type=whole, default=0, help="of adapters, dropout and the order of the data")
    add("--chunk-size", type=positive, help="tokens whose logits exist at a time (as fits)")
    remat = "computed again in the backward pass: less memory, more time; alone: layer"
    add("--remat", choices=REMAT, nargs="?", const="layer", default="nothing", help=remat)
    no_check = "try a step that is estimated not to fit into memory"
    add("--no-memory-check", dest="check_memory", action="store_false", help=no_check)
    add("--checkpoint-every", type=whole, default=50, help="steps between checkpoints; 0: none")
    add("--evaluate-every", type=whole, default=0, help="steps between evaluations; 0: at the end")
    add("--tensorboard", action="store_true", help="write logs for TensorBoard (pip: tensorboardX)")


def check(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """Checks options that do not go together; fills in what was left out."""
    check_model(parser, arguments)
    if len(arguments.adapter) > 1 or any(weight != 1 for weight in arguments.adapter.values()):
        parser.error("--adapter: one is trained further, unweighted. Fold others in first: merge")
    if arguments.adapter and arguments.method:
        parser.error("--adapter: what is trained further has its method. Leave --method out")
    arguments.method = arguments.method or "lora"
    arguments.save = arguments.save or ("merged" if arguments.method == "full" else "adapter")
    if arguments.save == "keras" and arguments.processes is not None:
        parser.error(
            "--save keras: Keras writes files in one process: save `merged`, and `convert`"
        )
    _check_data(parser, arguments)
    if arguments.method == "full" and arguments.save == "adapter":
        parser.error("--method full has no adapter: save `merged` or `keras`")
    if arguments.method == "full" and arguments.dtype in ("bfloat16", "float16"):
        parser.error(f"steps are lost in {arguments.dtype} weights: use --dtype mixed_bfloat16")
    if arguments.quantize and arguments.method == "full":
        parser.error("--quantize: integers do not train: choose a --method with adapters")
    if arguments.quantize and arguments.save == "merged":
        keep = "save the adapter, which fits the model as it was, or `keras`"
        parser.error(f"--quantize: a directory holds no integers: {keep}")


def _add_data(add: Callable[..., None]) -> None:
    files = ".jsonl, .json, .csv, .parquet, .txt, a pattern such as 'data/*.jsonl', or a hub name"
    add("--dataset", nargs="+", required=True, metavar="DATASET", help=files)
    add("--split", default="train", help="split of a hub dataset")
    stream = "read the data while training, not into memory; needs --steps"
    add("--streaming", action="store_true", help=stream)
    weights = "with --streaming: how often each dataset is drawn from (in turn, each example once)"
    add("--weights", nargs="+", type=float, metavar="WEIGHT", help=weights)
    ends = "with --weights: when all begin again (all_exhausted: the smaller ones begin before)"
    add("--stopping-strategy", choices=STOPPING_STRATEGIES, help=ends)
    buffer = "with --streaming: examples of which the next is drawn; 0: the order of the data"
    add("--shuffle-buffer", type=whole, default=1000, help=buffer)
    add("--held-out", type=share, default=0.1, help="share of the examples to evaluate on; 0: none")
    add("--evaluate-on", nargs="+", metavar="DATASET", help="datasets to evaluate on instead")
    most = "with --streaming: most examples to evaluate on"
    add("--evaluate-examples", type=positive, default=200, help=most)


def _check_data(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    if arguments.streaming and arguments.steps is None:
        parser.error("--streaming: how long a stream is shows when it ends: say --steps")
    if arguments.weights is not None and not arguments.streaming:
        parser.error("--weights: datasets are interleaved as they are read: add --streaming")
    if arguments.stopping_strategy is not None and arguments.weights is None:
        parser.error("--stopping-strategy: without --weights, each example comes once a pass")


def _add_with_default(parser: argparse.ArgumentParser, name: str, **options: Any) -> None:
    """Adds an option whose help ends with its default, if that says something."""
    if options.get("default") is not None:
        options["help"] += " (%(default)s)"
    parser.add_argument(name, **options)


# What the options describe ------------------------------------------------------------------------


def facts(arguments: argparse.Namespace) -> dict[str, Any]:
    """Returns what must be the same in a run that goes on."""
    names = ["preset", "method", "rank", "alpha", "dropout", "targets", "dtype"]
    names += ["split", "held_out", "length", "packing"]
    found = {name: getattr(arguments, name) for name in names}
    one = arguments.dataset[0] if len(arguments.dataset) == 1 else arguments.dataset
    found |= {"dataset": one, "evaluate_on": arguments.evaluate_on}
    if arguments.quantize:
        found["quantize"] = arguments.quantize
    if arguments.adapter:
        found["adapter"] = list(arguments.adapter)
    if arguments.streaming:
        names = ["streaming", "weights", "stopping_strategy", "shuffle_buffer", "evaluate_examples"]
        found |= {name: getattr(arguments, name) for name in names}
    return found


def read_data(
    arguments: argparse.Namespace, tokenizer: "Tokenizer"
) -> "tuple[Rows | StreamedRows, Rows | None]":
    """Returns the rows to train on and those to evaluate on; says how many there are."""
    return (_stream if arguments.streaming else _read)(arguments, tokenizer)


def _read(arguments: argparse.Namespace, tokenizer: "Tokenizer") -> "tuple[Rows, Rows | None]":
    from functional_llm import training

    def read(sources: list[str]) -> Any:
        records = [x for source in sources for x in training.read_records(source, arguments.split)]
        examples = training.make_examples(records, tokenizer, arguments.length)
        if cut := examples.describe(arguments.length):
            print(cut)
        return examples.items

    kept, held = read(arguments.dataset), []
    if arguments.evaluate_on:
        held = read(arguments.evaluate_on)
    else:
        kept, held = training.split_examples(kept, arguments.held_out, arguments.seed)
    rows = training.pack(kept, arguments.length, join=arguments.packing)
    held_out = training.pack(held, arguments.length, join=arguments.packing) if held else None
    counted = f"{len(kept)} examples in {len(rows)} row{'' if len(rows) == 1 else 's'}"
    print(f"{counted} of {rows.token_ids.shape[1]} tokens, {len(held)} held out")
    return rows, held_out


def _stream(
    arguments: argparse.Namespace, tokenizer: "Tokenizer"
) -> "tuple[StreamedRows, Rows | None]":
    from functional_llm import training

    def stream(sources: list[str]) -> list[Any]:
        return [training.stream_records(source, arguments.split) for source in sources]

    once, seed = "all_exhausted_without_replacement", arguments.seed
    kept, held = stream(arguments.dataset), stream(arguments.evaluate_on or [])
    if not held and arguments.held_out:
        pairs = [training.hold_out(x, arguments.held_out, seed) for x in kept]
        kept, held = ([pair[i] for pair in pairs] for i in range(2))
    strategy = arguments.stopping_strategy or ("all_exhausted" if arguments.weights else once)
    rows = training.StreamedRows(
        training.interleave(kept, arguments.weights, seed, strategy),
        tokenizer,
        arguments.length,
        join=arguments.packing,
        shuffle_buffer=arguments.shuffle_buffer,
        seed=seed,
    )
    rows.check()
    if not held:
        return rows, None
    mixed = training.interleave(held, stopping_strategy=once)
    some = list(islice(mixed, arguments.evaluate_examples))
    if not some:
        raise ValueError(
            f"--held-out: expected a share that leaves something to evaluate on, received "
            f"{arguments.held_out} of {mixed.name}. 0 holds out nothing; or use --evaluate-on."
        )
    examples = training.make_examples(some, tokenizer, arguments.length)
    held_out = training.pack(examples.items, arguments.length, join=arguments.packing)
    print(f"A stream of rows of {arguments.length} tokens, {len(examples.items)} held out")
    return rows, held_out


def make_settings(arguments: argparse.Namespace, num_rows: int | None) -> "Settings":
    """Returns the numbers of a run on so many rows or a stream; says which were chosen for it."""
    from functional_llm.training import Settings, plan_run

    plan = plan_run(
        num_rows,
        batch_size=arguments.batch_size,
        accumulate=arguments.accumulate,
        epochs=arguments.epochs,
        steps=arguments.steps,
    )
    rate = f"learning rate {arguments.learning_rate:g}"
    print(f"{plan.describe()}; {rate}. {plan.advice}".rstrip())
    numbers = {x.name: getattr(arguments, x.name) for x in fields(Settings)}
    return Settings(**{**numbers, "batch_size": plan.batch_size, "steps": plan.steps})


def facts_for_card(arguments: argparse.Namespace, settings: "Settings") -> "CardFacts":
    """Returns what the model card says of a fine-tuning."""
    from functional_llm.formats.model_card import CardFacts

    what = "An adapter" if arguments.adapter else arguments.method
    rows = settings.batch_size * settings.accumulate
    return CardFacts(
        datasets=[Path(x).name if Path(x).exists() else x for x in arguments.dataset],
        method=f"`functional-llm finetune`: {what}, {settings.steps} steps, rows of "
        f"{arguments.length} tokens, {rows} a step, learning rate {settings.learning_rate:g} "
        f"({settings.schedule}), in {arguments.dtype}.",
    )


def check_targets(arguments: argparse.Namespace) -> None:
    """Raises a `ValueError` if a target describes no layer of the model: before it is loaded."""
    from functional_llm.formats.weight_table import matrix_paths
    from functional_llm.graph.selection import matches
    from functional_llm.presets.sources import read_numbers

    if arguments.targets in (None, ["all"]):
        return
    family, config, _ = read_numbers(arguments.preset)
    paths = matrix_paths(family.rows(config), config.num_layers)
    for pattern in arguments.targets:
        if not any(matches(path, pattern) for path in paths):
            names = dict.fromkeys(path.rpartition("/")[2] for path in paths)
            raise ValueError(
                f"--targets: no layer of {arguments.preset} matches {pattern!r}. Expected names "
                f"({', '.join(names)}) or paths such as {paths[0]}; `*` stays within a "
                "name, `**` crosses slashes."
            )


def adapt(backbone: "Backbone", arguments: argparse.Namespace) -> "Backbone":
    """Returns the model to train: with adapters, unless all weights are trained."""
    from functional_llm import peft

    if arguments.method == "full":
        return backbone
    names = ("rank", "alpha", "dropout") if arguments.method in ("lora", "dora") else ()
    options: dict[str, Any] = {name: getattr(arguments, name) for name in names}
    if arguments.targets:
        options["targets"] = "all" if arguments.targets == ["all"] else arguments.targets
    return getattr(peft, arguments.method)(backbone, **options)
