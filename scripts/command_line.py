"""The options of the scripts, what they describe, and how a script ends.

Importing this file imports nothing of the library, nor JAX: a script parses its options first, so
that `--help` and mistakes are answered at once. The functions that make something of the options
import what they need.
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from functional_llm import Backbone
    from functional_llm.generation.samplers import Sampler
    from functional_llm.generation.text_generator import TextGenerator
    from functional_llm.training import Settings

METHODS = ("lora", "dora", "svf", "ia3", "bitfit", "full")
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
        print(f"{name}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        if advice:
            print(f"\n{name}: {advice}", file=sys.stderr)
        else:
            print()
        return interrupted
    return 0


# Options ------------------------------------------------------------------------------------------


def parse_generate(description: str | None) -> argparse.Namespace:
    """Returns what the command line says of writing text."""
    parser = argparse.ArgumentParser(usage="%(prog)s [options]", description=description)
    add = parser.add_argument
    _add_preset(parser)
    prompt = parser.add_mutually_exclusive_group()
    prompt.add_argument(
        "--prompt", default="The capital of France is", help="text to go on from (%(default)s)"
    )
    prompt.add_argument("--prompt-file", type=Path, help="file with the text; - for standard input")
    add("--chat", action="store_true", help="ask the prompt as a user, by the chat template")
    add("--max-new-tokens", type=positive, default=128, help="most tokens to write (%(default)s)")
    add(
        "--sampler",
        choices=["greedy", "random", "top_k", "top_p", "min_p"],
        help="how tokens are drawn; greedy, or random if a number below is given",
    )
    add("--temperature", type=float, help="below 1 is bolder, above 1 wilder; 0 is greedy")
    add("--top-k", type=int, help="draw from the k likeliest tokens")
    add("--top-p", type=float, help="draw from the likeliest tokens that make up p together")
    add("--min-p", type=float, help="leave out what is less than p times as likely as the first")
    add("--repetition-penalty", type=float, help="above 1 makes tokens seen before less likely")
    add("--stop", action="append", default=[], help="text that ends the answer; may be repeated")
    add("--seed", type=int, help="of the random numbers, to get the same text again")
    _add_precision(parser)
    add("--stats", action="store_true", help="print load, compile, prefill and decode figures")
    return parser.parse_args()


def parse_chat(description: str | None) -> argparse.Namespace:
    """Returns what the command line says of a conversation."""
    parser = argparse.ArgumentParser(
        usage="%(prog)s [options]",
        description=f"{description} An empty line or the end of input ends the conversation.",
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
    return parser.parse_args()


def parse_finetune(description: str | None) -> argparse.Namespace:
    """Returns what the command line says of a fine-tuning."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    _add_preset(parser)
    add("--dataset", required=True, help=".jsonl, .json, .csv, .parquet, .txt, or a hub name")
    add("--split", default="train", help="split of a hub dataset")
    add("--held-out", type=float, default=0.1, help="share of the examples to evaluate on")
    add("--output", type=Path, required=True, help="directory for the result")
    add("--save", choices=["adapter", "merged", "keras"], help="merged for full, else adapter")
    add("--resume", action="store_true", help="go on from the checkpoint in the output directory")
    add("--method", choices=METHODS, default="lora", help="what is trained")
    add("--rank", type=int, default=8, help="of LoRA and DoRA")
    add("--alpha", type=float, default=16.0, help="of LoRA and DoRA")
    add("--dropout", type=float, default=0.0, help="of LoRA and DoRA")
    add("--targets", nargs="+", help="layers by name or path: query decoder_*/mlp/*; or all")
    add("--dtype", default="float32", help="float32, bfloat16, mixed_bfloat16 or float16")
    add("--length", type=int, default=512, help="tokens of a row; longer examples are cut")
    add("--no-packing", dest="packing", action="store_false", help="an example a row")
    add("--epochs", type=float, default=3.0, help="passes over the data, unless --steps is given")
    add("--steps", type=int, help="updates of the weights")
    add("--batch-size", type=int, default=4, help="rows of a batch")
    add("--accumulate", type=int, default=1, help="batches that make one step")
    add("--learning-rate", type=float, default=1e-3, help="the highest")
    add("--schedule", choices=["cosine", "linear", "constant"], default="cosine", help="its course")
    add("--warmup-steps", type=int, default=0, help="steps in which the learning rate rises")
    add("--weight-decay", type=float, default=0.0, help="of AdamW")
    add("--clip-norm", type=float, default=1.0, help="longest gradient; 0 for no limit")
    add("--seed", type=int, default=0, help="of adapters, dropout and the order of the data")
    add("--chunk-size", type=int, default=512, help="tokens whose logits exist at a time")
    add("--remat", action="store_true", help="less memory, more time")
    add("--checkpoint-every", type=int, default=50, help="steps between checkpoints; 0: none")
    add("--evaluate-every", type=int, default=0, help="steps between evaluations; 0: at the end")
    add("--tensorboard", action="store_true", help="write logs for TensorBoard")
    arguments = parser.parse_args()
    arguments.save = arguments.save or ("merged" if arguments.method == "full" else "adapter")
    if arguments.method == "full" and arguments.save == "adapter":
        parser.error("--method full has no adapter: save `merged` or `keras`")
    if arguments.method == "full" and arguments.dtype in ("bfloat16", "float16"):
        parser.error(f"steps are lost in {arguments.dtype} weights: use --dtype mixed_bfloat16")
    return arguments


def _add_preset(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--preset",
        default="smollm2_135m_instruct",
        help="preset name, directory in Hugging Face layout, .gguf or .keras file, hf://org/name "
        "(default: %(default)s)",
    )


def _add_precision(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dtype", default="float32", help="float32 (default), bfloat16 or float16")
    explanation = "a byte a number; fastest with --dtype bfloat16"
    parser.add_argument("--quantize", choices=["int8"], help=explanation)


def positive(text: str) -> int:
    """Returns a whole number above 0."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number above 0, received {text!r}")
    return int(text)


# What the options describe ------------------------------------------------------------------------


def read_prompt(arguments: argparse.Namespace) -> str:
    """Returns the prompt's text."""
    path = arguments.prompt_file
    if path is None:
        return arguments.prompt
    try:
        return sys.stdin.read() if str(path) == "-" else path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ValueError(f"--prompt-file: expected a text file in UTF-8. {error}") from None


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


def load_generator(arguments: argparse.Namespace) -> "TextGenerator":
    """Returns a generator with the model, quantised if asked for, and its tokenizer."""
    from functional_llm.edits.quantization import quantize
    from functional_llm.generation.text_generator import TextGenerator
    from functional_llm.presets import Backbone, Tokenizer

    backbone = Backbone.from_preset(arguments.preset, dtype=arguments.dtype)
    if arguments.quantize:
        backbone = quantize(backbone, arguments.quantize)
    return TextGenerator(backbone, Tokenizer.from_preset(arguments.preset))


def make_settings(arguments: argparse.Namespace, num_rows: int) -> "Settings":
    """Returns the numbers of a training run on so many rows."""
    from functional_llm.training import Settings

    rows_a_step = arguments.batch_size * arguments.accumulate
    numbers = {x.name: getattr(arguments, x.name) for x in fields(Settings)}
    if numbers["steps"] is None:
        numbers["steps"] = max(1, round(arguments.epochs * num_rows / max(rows_a_step, 1)))
    return Settings(**numbers)


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
