"""Writes text with a language model, streamed to the terminal."""

import argparse
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

STARTED = time.perf_counter()


def main() -> int:
    """Parses, loads, writes."""
    arguments = parse_arguments()
    import functional_llm as flm  # after --help, which shall not wait for it

    try:  # first what needs no model: it may be wrong
        text = read_prompt(arguments)
        sampler = make_sampler(arguments, flm.samplers)
        loading = time.perf_counter()
        backbone = flm.Backbone.from_preset(arguments.preset, dtype=arguments.dtype)
        if arguments.quantize:
            backbone = flm.quantize(backbone, arguments.quantize)
        tokenizer = flm.Tokenizer.from_preset(arguments.preset)
        loaded = time.perf_counter() - loading
        generator = flm.TextGenerator(backbone, tokenizer)
        pieces = generator.stream(
            make_prompt(text, arguments.chat, tokenizer),
            max_new_tokens=arguments.max_new_tokens,
            sampler=sampler,
            stop=arguments.stop,
            seed=arguments.seed,
        )
        first = write(pieces)
    except (ValueError, OSError, RuntimeError) as error:
        print(f"generate.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print()
        return 130
    if arguments.stats:
        print_stats(generator.stats, loaded, first)
    return 0


def parse_arguments() -> argparse.Namespace:
    """Returns what the command line says."""
    parser = argparse.ArgumentParser(
        usage="%(prog)s [options]",
        description=__doc__,
    )
    add = parser.add_argument
    add(
        "--preset",
        default="smollm2_135m_instruct",
        help="preset name, directory in Hugging Face layout, .gguf or .keras file, hf://org/name "
        "(default: %(default)s)",
    )
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
    add("--dtype", default="float32", help="float32 (default), bfloat16 or float16")
    add("--quantize", choices=["int8"], help="a byte a number; fastest with --dtype bfloat16")
    add("--stats", action="store_true", help="print load, compile, prefill and decode figures")
    return parser.parse_args()


def positive(text: str) -> int:
    """Returns a whole number above 0."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number above 0, received {text!r}")
    return int(text)


def read_prompt(arguments: argparse.Namespace) -> str:
    """Returns the prompt's text."""
    path = arguments.prompt_file
    if path is None:
        return arguments.prompt
    try:
        return sys.stdin.read() if str(path) == "-" else path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ValueError(f"--prompt-file: expected a text file in UTF-8. {error}") from None


def make_prompt(text: str, chat: bool, tokenizer: Any) -> str | list[int]:
    """Returns the prompt's text, or its ids with --chat."""
    if chat:
        return tokenizer.apply_chat_template([{"role": "user", "content": text}], tokenize=True)
    if sys.stdout.isatty():
        print(text, end="", flush=True)
    return text


def make_sampler(arguments: argparse.Namespace, samplers: Any) -> Any:
    """Returns the sampler that the options describe."""
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    numbers = {name: getattr(arguments, name) for name in names}
    numbers = {name: value for name, value in numbers.items() if value is not None}
    name = arguments.sampler
    if numbers.get("temperature") == 0:
        name, _ = "greedy", numbers.pop("temperature")
    if name is None:
        name = "random" if set(numbers) - {"repetition_penalty"} else "greedy"
    return samplers.get(name, **numbers)


def write(pieces: Iterator[str]) -> float | None:
    """Prints pieces as they come; returns the seconds from process start to the first."""
    first = None
    for piece in pieces:
        if first is None:
            first = time.perf_counter() - STARTED
        print(piece, end="", flush=True)
    print()
    return first


def print_stats(stats: Any, loaded: float, first: float | None) -> None:
    """Prints figures to standard error."""
    prefill = stats.prefill_tokens / max(stats.prefill_seconds, 1e-9)
    decode = stats.decode_tokens / max(stats.decode_seconds, 1e-9)
    rows = [
        ("load", f"{loaded:.2f} s"),
        ("compile", f"{stats.compile_seconds:.2f} s"),
        ("prefill", f"{stats.prefill_tokens} tokens, {prefill:.0f} tokens/s"),
        ("decode", f"{stats.decode_tokens} tokens, {decode:.1f} tokens/s"),
        ("first token", "none" if first is None else f"{first:.2f} s after start"),
    ]
    for name, value in rows:
        print(f"{name:>12}  {value}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
