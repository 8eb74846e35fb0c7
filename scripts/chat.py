"""Talks with a language model in the terminal; every turn reuses the cache of those before."""

import argparse
import sys
from typing import Any

import command_line


def main() -> int:
    """Parses, then talks until the end of input."""
    arguments = command_line.parse_chat(__doc__)
    return command_line.run_command("chat.py", lambda: run(arguments), interrupted=0)


def run(arguments: argparse.Namespace) -> None:
    """Loads; reads a line, streams the answer, and again."""
    sampler = command_line.make_sampler(arguments)  # first: it may be wrong
    generator = command_line.load_generator(arguments)
    from functional_llm import PromptCache

    if sys.stdin.isatty():
        print("Write a message; an empty line ends the conversation.", file=sys.stderr)
    cache = PromptCache()
    messages = [{"role": "system", "content": arguments.system}] if arguments.system else []
    while line := read_line():
        messages.append({"role": "user", "content": line})
        ids = generator.tokenizer.apply_chat_template(messages, tokenize=True)
        answer = ""
        for piece in generator.stream(
            ids,
            max_new_tokens=arguments.max_new_tokens,
            sampler=sampler,
            seed=arguments.seed,
            past=cache,
        ):
            print(piece, end="", flush=True)
            answer += piece
        print("\n")
        messages.append({"role": "assistant", "content": answer})
        if arguments.stats:
            print_stats(generator.stats, len(ids))


def read_line() -> str:
    """Returns a line of the user's, empty at the end of input."""
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return ""


def print_stats(stats: Any, num_tokens: int) -> None:
    """Prints figures of a turn to standard error."""
    known = num_tokens - stats.prefill_tokens
    print(
        f"{known} of {num_tokens} prompt tokens were in the cache, {stats.prefill_tokens} "
        f"prefilled in {stats.prefill_seconds:.2f} s; {stats.decode_tokens} decoded in "
        f"{stats.decode_seconds:.2f} s\n",
        file=sys.stderr,
    )


if __name__ == "__main__":
    sys.exit(main())
