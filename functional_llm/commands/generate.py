"""`generate`: writes text with a language model, streamed to the terminal."""

import argparse
import sys
import time
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any

from functional_llm.commands.command import STARTED, Command
from functional_llm.commands.loading import Model, make_sampler, no_search_for_garbage
from functional_llm.commands.options import (
    add_adapters,
    add_mesh,
    add_precision,
    add_preset,
    check_model,
    filled,
    positive,
)
from functional_llm.commands.processes import join


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of writing text."""
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
    add_adapters(parser)
    add_precision(parser)
    add_mesh(parser)
    add("--stats", action="store_true", help="print load, compile, prefill and decode figures")


def run(arguments: argparse.Namespace) -> None:
    """Loads, writes."""
    join(arguments)
    # First what needs no model: it may be wrong.
    text = read_prompt(arguments.prompt, arguments.prompt_file)
    sampler = make_sampler(arguments)
    loading = time.perf_counter()
    model = Model(arguments)
    tokenizer = model.load_tokenizer()
    prompt: Any = [{"role": "user", "content": text}] if arguments.chat else text
    model.check_prompt(tokenizer, prompt)
    generator = model.load_generator(tokenizer)
    loaded = time.perf_counter() - loading
    if not arguments.chat and sys.stdout.isatty():
        print(text, end="", flush=True)
    pieces = generator.stream(
        prompt,
        max_new_tokens=arguments.max_new_tokens,
        sampler=sampler,
        stop=arguments.stop,
        seed=arguments.seed,
    )
    with no_search_for_garbage():
        begun = list(islice(pieces, 1))  # which traces programs
    first = write(chain(begun, pieces))
    if arguments.stats:
        print_stats(generator.stats, loaded, first)


def read_prompt(prompt: str, path: Path | None) -> str:
    """Returns the prompt's text: that of a file, if there is one."""
    if path is None:
        return prompt
    try:
        text = sys.stdin.read() if str(path) == "-" else path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ValueError(f"--prompt-file: expected a text file in UTF-8. {error}") from None
    if not text:
        raise ValueError("--prompt-file: expected at least one character, received none.")
    return text


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


COMMAND = Command(
    description="Writes text with a language model, streamed to the terminal.",
    add_options=add_options,
    check=check_model,
    run=run,
)
