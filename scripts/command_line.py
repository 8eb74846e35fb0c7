"""The options of the scripts that write, what they describe, and how a script ends.

Importing this file imports nothing of the library, nor JAX: a script parses its options first, so
that `--help` and mistakes are answered at once. The functions that make something of the options
import what they need.
"""

import argparse
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from functional_llm import Tokenizer
    from functional_llm.generation.prompts import AnyPrompt
    from functional_llm.generation.samplers import Sampler
    from functional_llm.generation.text_generator import TextGenerator

DTYPES = ("float32", "bfloat16", "float16", "mixed_bfloat16", "mixed_float16")
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
    add_preset(parser)
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
    add_preset(parser)
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


def add_preset(parser: argparse.ArgumentParser) -> None:
    """Adds the option that names the model."""
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
