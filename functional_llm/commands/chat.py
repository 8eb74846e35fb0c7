"""`chat`: talks with a language model; every turn reuses the cache of those before."""

import argparse
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

from functional_llm.commands.command import Command
from functional_llm.commands.loading import Model, make_sampler
from functional_llm.commands.options import (
    add_adapters,
    add_mesh,
    add_precision,
    add_preset,
    check_model,
    positive,
)

HELP = """\
/help       shows this
/clear      forgets the conversation
/save FILE  writes the conversation as JSON, which finetune takes as a dataset
/quit       ends, as Ctrl-D does
A line that ends in \\ goes on in the next one. Begin a message that starts with / with a space.
Ctrl-C ends an answer; what is there of it stays."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of a conversation."""
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
    add_adapters(parser)
    add_precision(parser)
    add_mesh(parser, several=False)
    add("--stats", action="store_true", help="after each turn, how much the cache spared")


def run(arguments: argparse.Namespace) -> None:
    """Loads; reads a message, streams the answer, and again."""
    # First what needs no model: it may be wrong.
    sampler = make_sampler(arguments)
    model = Model(arguments)
    tokenizer = model.load_tokenizer()
    system = [{"role": "system", "content": arguments.system}] if arguments.system else []
    messages = [*system, {"role": "user", "content": "Hello"}]
    model.check_prompt(tokenizer, messages)
    generator = model.load_generator(tokenizer)
    from functional_llm.generation.chat import Chat

    chat = Chat(
        generator,
        arguments.system,
        max_new_tokens=arguments.max_new_tokens,
        sampler=sampler,
        seed=arguments.seed,
    )
    is_terminal = sys.stdin.isatty()
    if is_terminal:
        _edit_lines()
        say("Write a message. /help lists what else can be done; Ctrl-D ends.")
    while (message := read_message(is_terminal)) is not None:
        try:
            if message.startswith("/"):
                if not obey(message, chat):
                    return
            elif message.strip():
                answer(chat, message.strip(), arguments.stats)
        except KeyboardInterrupt:  # ends this answer
            if not is_terminal:
                raise
        except (ValueError, OSError) as error:  # of this message: the next one may do
            if not is_terminal:
                raise
            say(str(error))


def _edit_lines() -> None:
    """Lets `input` edit lines, and know those before."""
    try:
        import readline  # noqa: F401
    except ImportError:  # Windows has a console that does both
        return


def read_message(is_terminal: bool) -> str | None:
    """Returns the user's next message, `None` at the end of input or after Ctrl-C twice."""
    lines: list[str] = []
    was_interrupted = False
    while True:
        prompt = "... " if lines else "> "
        try:
            line = input(prompt if is_terminal else "")
        except EOFError:
            if is_terminal:
                print()
            return "\n".join(lines) if lines else None
        except KeyboardInterrupt:
            if was_interrupted or not is_terminal:
                raise
            say("\nCtrl-C once more, or Ctrl-D, ends.")
            lines, was_interrupted = [], True
            continue
        if not line.endswith("\\"):
            return "\n".join([*lines, line])
        lines.append(line[:-1])
        was_interrupted = False


def obey(command: str, chat: Any) -> bool:
    """Does what a line that begins with / says; returns whether the conversation goes on."""
    name, _, argument = command.strip().partition(" ")
    if name == "/quit":
        return False
    if name == "/help":
        say(HELP)
    elif name == "/clear":
        chat.clear()
        say("The conversation is forgotten.")
    elif name == "/save" and argument.strip():
        path = Path(argument.strip()).expanduser()
        chat.save(path)
        say(f"{len(chat.messages)} messages are in {path}.")
    elif name == "/save":
        say("Expected a file: /save FILE")
    else:
        say(f"There is no command {name}. /help lists them.")
    return True


def answer(chat: Any, message: str, stats: bool) -> None:
    """Prints the answer as it comes; Ctrl-C ends it."""
    left_out = chat.num_left_out
    pieces = chat.say(message)
    if chat.num_left_out > left_out:
        say(
            f"The context of {chat.generator.context} tokens is full: from now on the model does "
            f"not read the oldest {chat.num_left_out} messages. /clear begins anew."
        )
    try:
        with closing(pieces):
            for piece in pieces:
                print(piece, end="", flush=True)
    finally:
        print("\n", flush=True)
    if stats:
        print_stats(chat.generator.stats)


def say(text: str) -> None:
    """Prints a line that is not the model's."""
    print(text, file=sys.stderr, flush=True)


def print_stats(stats: Any) -> None:
    """Prints figures of a turn to standard error."""
    say(
        f"{stats.prefill_tokens} tokens prefilled in {stats.prefill_seconds:.2f} s, the cache held "
        f"the others; {stats.decode_tokens} decoded in {stats.decode_seconds:.2f} s\n"
    )


COMMAND = Command(
    description="Talks with a language model in the terminal; every turn reuses the cache of those "
    "before. /help there lists what it can; the end of input ends it.",
    add_options=add_options,
    check=check_model,
    run=run,
    interrupted=0,
)
