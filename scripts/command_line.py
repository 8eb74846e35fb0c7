"""The options of the scripts, what they describe, and how a script ends.

Importing this file imports nothing of the library, nor JAX: a script parses its options first, so
that `--help` and mistakes are answered at once. The functions that make something of the options
import what they need.
"""

import argparse
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from functional_llm import Backbone, Tokenizer
    from functional_llm.generation.prompts import AnyPrompt
    from functional_llm.generation.samplers import Sampler
    from functional_llm.generation.text_generator import TextGenerator
    from functional_llm.training import Settings

METHODS = ("lora", "dora", "svf", "ia3", "bitfit", "full")
DTYPES = ("float32", "bfloat16", "float16", "mixed_bfloat16", "mixed_float16")
REMAT = ("nothing", "products", "layer")
SAMPLER_NUMBERS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


def run_command(
    name: str, command: Callable[[], None], interrupted: int = 130, advice: str = ""
) -> int:
    """Runs a command; returns its exit code, 2 after a line that says what is wrong.

    Args:
        name: Name of the command, which begins its messages.
        command: What to do.
        interrupted: Exit code after Ctrl-C.
        advice: What to say after Ctrl-C.
    """
    try:
        command()
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        print(f"{name}: {error}", *getattr(error, "__notes__", ()), sep="\n", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        if advice:
            print(f"\n{name}: {advice}", file=sys.stderr)
        else:
            print()
        return interrupted
    return 0


def first_line(error: Exception) -> str:
    """Returns what an error says, in one line."""
    return f"{type(error).__name__}: {error}".strip().partition("\n")[0]


# Options ------------------------------------------------------------------------------------------


def parse_generate(description: str | None) -> argparse.Namespace:
    """Returns what the command line says of writing text."""
    parser = argparse.ArgumentParser(usage="%(prog)s [options]", description=description)
    add = parser.add_argument
    _add_preset(parser)
    prompt = parser.add_mutually_exclusive_group()
    prompt.add_argument(
        "--prompt",
        type=filled,
        default="The capital of France is",
        help="text to go on from (%(default)s)",
    )
    prompt.add_argument("--prompt-file", type=Path, help="file with the text; - for standard input")
    add("--chat", action="store_true", help="ask the prompt as a user, by the chat template")
    add("--max-new-tokens", type=positive, default=128, help="most tokens to write (%(default)s)")
    add(
        "--sampler",
        choices=["greedy", "random", "top_k", "top_p", "min_p"],
        help="how tokens are drawn (greedy; random with one of the next four numbers)",
    )
    add("--temperature", type=float, help="below 1 is bolder, above 1 wilder; 0 is greedy")
    add("--top-k", type=int, help="draw from the k likeliest tokens")
    add("--top-p", type=float, help="draw from the likeliest tokens that make up p together")
    add("--min-p", type=float, help="leave out what is less than p times as likely as the first")
    add("--repetition-penalty", type=float, help="above 1 makes tokens seen before less likely")
    add(
        "--stop",
        type=filled,
        action="append",
        default=[],
        help="text that ends the answer; may be repeated",
    )
    add("--seed", type=int, help="of the random numbers, to get the same text again")
    _add_precision(parser)
    add("--stats", action="store_true", help="print load, compile, prefill and decode figures")
    return _checked(parser)


def parse_chat(description: str | None) -> argparse.Namespace:
    """Returns what the command line says of a conversation."""
    parser = argparse.ArgumentParser(
        usage="%(prog)s [options]",
        description=f"{description} /help there lists what it can; the end of input ends it.",
    )
    add = parser.add_argument
    _add_preset(parser)
    add("--system", help="what the model is told before the conversation")
    add(
        "--max-new-tokens",
        type=positive,
        default=256,
        help="most tokens of an answer (%(default)s)",
    )
    add(
        "--temperature",
        type=float,
        default=0.0,
        help="0 (default) always takes the likeliest token",
    )
    add("--seed", type=int, help="of the random numbers")
    _add_precision(parser)
    add("--stats", action="store_true", help="after each turn, how much the cache spared")
    return _checked(parser)


def parse_finetune(description: str | None) -> argparse.Namespace:
    """Returns what the command line says of a fine-tuning."""
    parser = argparse.ArgumentParser(usage="%(prog)s [options]", description=description)
    add = partial(_add_with_default, parser)
    _add_preset(parser)
    add("--dataset", required=True, help=".jsonl, .json, .csv, .parquet, .txt, or a hub name")
    add("--split", default="train", help="split of a hub dataset")
    add("--held-out", type=share, default=0.1, help="share of the examples to evaluate on; 0: none")
    add("--output", type=Path, required=True, help="directory for the result")
    add("--save", choices=["adapter", "merged", "keras"], help="(merged for full, else adapter)")
    add("--resume", action="store_true", help="go on from the checkpoint in the output directory")
    add("--method", choices=METHODS, default="lora", help="what is trained")
    add("--rank", type=positive, default=8, help="of LoRA and DoRA")
    add("--alpha", type=above_zero, default=16.0, help="of LoRA and DoRA")
    add("--dropout", type=share, default=0.0, help="of LoRA and DoRA")
    targets = "layers by name or path: query decoder_*/mlp/*; or all (what is usual for the method)"
    add("--targets", nargs="+", metavar="TARGET", help=targets)
    add("--dtype", choices=DTYPES, default="float32", help="of the model's numbers")
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
    arguments = parser.parse_args()
    arguments.save = arguments.save or ("merged" if arguments.method == "full" else "adapter")
    if arguments.method == "full" and arguments.save == "adapter":
        parser.error("--method full has no adapter: save `merged` or `keras`")
    if arguments.method == "full" and arguments.dtype in ("bfloat16", "float16"):
        parser.error(f"steps are lost in {arguments.dtype} weights: use --dtype mixed_bfloat16")
    return arguments


def _add_with_default(parser: argparse.ArgumentParser, name: str, **options: Any) -> None:
    """Adds an option whose help ends with its default, if that says something."""
    if options.get("default") is not None:
        options["help"] += " (%(default)s)"
    parser.add_argument(name, **options)


def _add_preset(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--preset",
        default="smollm2_135m_instruct",
        help="preset name, directory in Hugging Face layout, .gguf or .keras file, hf://org/name "
        "(%(default)s: a 4-bit file, whose weights are dequantised; the full ones are at "
        "hf://HuggingFaceTB/SmolLM2-135M-Instruct)",
    )


def _add_precision(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--adapter", type=Path, help="directory that finetune.py or PEFT has written"
    )
    parser.add_argument("--dtype", choices=DTYPES[:3], default="float32", help="(%(default)s)")
    explanation = "a byte a number; fastest with --dtype bfloat16"
    parser.add_argument("--quantize", choices=["int8"], help=explanation)


def _checked(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Returns the options, if the model can be loaded as they say."""
    arguments = parser.parse_args()
    if arguments.quantize and arguments.dtype == "float16":
        parser.error("--quantize leaves the range of float16: use --dtype bfloat16")
    if arguments.adapter and not (arguments.adapter / "adapter_config.json").is_file():
        parser.error(f"--adapter: {arguments.adapter} has no adapter_config.json")
    return arguments


def _number(
    kind: Callable[[str], float], expected: str, is_right: Callable[[float], bool]
) -> Callable[[str], Any]:
    """Returns what makes a number of an option's text, or says what was expected."""

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and is_right(value)):
            raise argparse.ArgumentTypeError(f"expected {expected}, received {text!r}")
        return value

    return parse


positive = _number(int, "a whole number above 0", lambda x: x > 0)
whole = _number(int, "a whole number, 0 or more", lambda x: x >= 0)
above_zero = _number(float, "a number above 0", lambda x: x > 0)
not_negative = _number(float, "a number, 0 or more", lambda x: x >= 0)
share = _number(float, "a number from 0 to below 1", lambda x: 0 <= x < 1)


def filled(text: str) -> str:
    """Returns a text of at least one character."""
    if not text:
        raise argparse.ArgumentTypeError("expected at least one character, received none")
    return text


# What the options describe ------------------------------------------------------------------------


def read_prompt(arguments: argparse.Namespace) -> str:
    """Returns the prompt's text."""
    path = arguments.prompt_file
    if path is None:
        return arguments.prompt
    try:
        text = sys.stdin.read() if str(path) == "-" else path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ValueError(f"--prompt-file: expected a text file in UTF-8. {error}") from None
    if not text:
        raise ValueError("--prompt-file: expected at least one character, received none.")
    return text


def make_sampler(arguments: argparse.Namespace) -> "Sampler":
    """Returns the sampler that the options describe: greedy, unless they have numbers of others."""
    from functional_llm.generation import samplers

    numbers = {name: getattr(arguments, name, None) for name in SAMPLER_NUMBERS}
    numbers = {name: value for name, value in numbers.items() if value is not None}
    name = getattr(arguments, "sampler", None)
    if numbers.get("temperature") == 0:
        name, _ = "greedy", numbers.pop("temperature")
    if name is None:
        name = "random" if set(numbers) - {"repetition_penalty"} else "greedy"
    return samplers.get(name, **numbers)


def introduce(preset: str) -> None:
    """Says on a terminal what model a preset's name stands for."""
    from functional_llm.presets.table import preset_names, read_preset

    if sys.stderr.isatty() and preset in preset_names():
        print(f"{preset}: {read_preset(preset)['description']}", file=sys.stderr)


def load_tokenizer(arguments: argparse.Namespace) -> "Tokenizer":
    """Returns the model's tokenizer."""
    from functional_llm.presets import Tokenizer

    return Tokenizer.from_preset(arguments.preset)


def check_prompt(
    arguments: argparse.Namespace, tokenizer: "Tokenizer", prompt: "AnyPrompt"
) -> None:
    """Raises a `ValueError` if prompt and answer do not fit into the model: before it is loaded."""
    from functional_llm.generation.arguments import check_request
    from functional_llm.generation.prompts import encode_prompt
    from functional_llm.presets.sources import read_numbers

    _, config, _ = read_numbers(arguments.preset)
    size, context = config.vocabulary_size, config.max_sequence_length
    check_request([encode_prompt(tokenizer, prompt)], arguments.max_new_tokens, size, context)


def load_generator(arguments: argparse.Namespace, tokenizer: "Tokenizer") -> "TextGenerator":
    """Returns a generator with the model: quantised and with an adapter, if asked for."""
    from functional_llm import peft
    from functional_llm.edits.quantization import quantize
    from functional_llm.generation.text_generator import TextGenerator
    from functional_llm.presets import Backbone

    backbone = Backbone.from_preset(arguments.preset, dtype=arguments.dtype)
    if arguments.quantize:
        backbone = quantize(backbone, arguments.quantize)
    if arguments.adapter:
        backbone = peft.load_adapter(backbone, arguments.adapter)
    return TextGenerator(backbone, tokenizer, announce)


@contextmanager
def announce(what: str) -> Iterator[None]:
    """Says on a terminal that programs are compiled, and takes it back when they are."""
    if not sys.stderr.isatty():
        yield
        return
    # The terminal keeps the place of the cursor, and gets it back.
    print(f"\0337 [compiling {what}, once for each size]", end="", file=sys.stderr, flush=True)
    try:
        yield
    finally:
        print("\0338\033[J", end="", file=sys.stderr, flush=True)


def make_settings(arguments: argparse.Namespace, num_rows: int) -> "Settings":
    """Returns the numbers of a training run on so many rows; says which were chosen for it."""
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


def check_targets(arguments: argparse.Namespace) -> None:
    """Raises a `ValueError` if a target describes no layer of the model: before it is loaded."""
    from functional_llm.formats.weight_table import module_names
    from functional_llm.graph.selection import matches
    from functional_llm.presets.sources import read_numbers

    if arguments.targets in (None, ["all"]):
        return
    family, config, _ = read_numbers(arguments.preset)
    paths = module_names(family.weights, config.num_layers)
    for pattern in arguments.targets:
        if not any(matches(path, pattern) for path in paths):
            names = dict.fromkeys(path.rpartition("/")[2] for path in paths)
            raise ValueError(
                f"--targets: no layer of {arguments.preset} matches {pattern!r}. Expected names "
                f"({', '.join(names)}) or paths such as {next(iter(paths))}; `*` stays within a "
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
