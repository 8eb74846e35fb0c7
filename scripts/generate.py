"""Writes text with a language model, streamed to the terminal."""

import argparse
import sys
import time
from collections.abc import Iterator
from typing import Any

import command_line

STARTED = time.perf_counter()


def main() -> int:
    """Parses, then writes."""
    arguments = command_line.parse_generate(__doc__)
    return command_line.run_command("generate.py", lambda: run(arguments))


def run(arguments: argparse.Namespace) -> None:
    """Loads, writes."""
    # First what needs no model: it may be wrong.
    text = command_line.read_prompt(arguments)
    sampler = command_line.make_sampler(arguments)
    command_line.introduce(arguments.preset)
    loading = time.perf_counter()
    tokenizer = command_line.load_tokenizer(arguments)
    prompt = [{"role": "user", "content": text}] if arguments.chat else text
    command_line.check_prompt(arguments, tokenizer, prompt)
    generator = command_line.load_generator(arguments, tokenizer)
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
    first = write(pieces)
    if arguments.stats:
        print_stats(generator.stats, loaded, first)


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
