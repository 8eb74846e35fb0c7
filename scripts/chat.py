"""Talks with a language model in the terminal; every turn reuses the cache of those before."""

import argparse
import sys
from typing import Any


def main() -> int:
    """Parses, loads, talks until the end of input."""
    arguments = parse_arguments()
    import functional_llm as flm  # after --help, which shall not wait for it

    try:
        sampler = make_sampler(arguments, flm.samplers)  # first, for it may be wrong
        backbone = flm.Backbone.from_preset(arguments.preset, dtype=arguments.dtype)
        if arguments.quantize:
            backbone = flm.quantize(backbone, arguments.quantize)
        tokenizer = flm.Tokenizer.from_preset(arguments.preset)
        generator = flm.TextGenerator(backbone, tokenizer)
        talk(generator, tokenizer, sampler, arguments, flm.PromptCache())
    except (ValueError, OSError, RuntimeError) as error:
        print(f"chat.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print()
    return 0


def parse_arguments() -> argparse.Namespace:
    """Returns what the command line says."""
    parser = argparse.ArgumentParser(
        usage="%(prog)s [options]",
        description=__doc__ + " An empty line or the end of input ends the conversation.",
    )
    add = parser.add_argument
    add(
        "--preset",
        default="smollm2_135m_instruct",
        help="preset name, directory in Hugging Face layout, .gguf or .keras file, hf://org/name "
        "(default: %(default)s)",
    )
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
    add("--dtype", default="float32", help="float32 (default), bfloat16 or float16")
    add("--quantize", choices=["int8"], help="a byte a number; fastest with --dtype bfloat16")
    add("--stats", action="store_true", help="after each turn, how much the cache spared")
    return parser.parse_args()


def positive(text: str) -> int:
    """Returns a whole number above 0."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number above 0, received {text!r}")
    return int(text)


def make_sampler(arguments: argparse.Namespace, samplers: Any) -> Any:
    """Returns greedy at temperature 0, else a random sampler."""
    if arguments.temperature == 0:
        return samplers.get("greedy")
    return samplers.get("random", temperature=arguments.temperature)


def talk(generator: Any, tokenizer: Any, sampler: Any, arguments: Any, past: Any) -> None:
    """Reads a line, streams the answer, and again."""
    if sys.stdin.isatty():
        print("Write a message; an empty line ends the conversation.", file=sys.stderr)
    messages = [{"role": "system", "content": arguments.system}] if arguments.system else []
    while line := read_line():
        messages.append({"role": "user", "content": line})
        ids = tokenizer.apply_chat_template(messages, tokenize=True)
        answer = ""
        for piece in generator.stream(
            ids,
            max_new_tokens=arguments.max_new_tokens,
            sampler=sampler,
            seed=arguments.seed,
            past=past,
        ):
            print(piece, end="", flush=True)
            answer += piece
        print("\n")
        messages.append({"role": "assistant", "content": answer})
        if arguments.stats:
            stats = generator.stats
            known = len(ids) - stats.prefill_tokens
            print(
                f"{known} of {len(ids)} prompt tokens were in the cache, {stats.prefill_tokens} "
                f"prefilled in {stats.prefill_seconds:.2f} s; {stats.decode_tokens} decoded in "
                f"{stats.decode_seconds:.2f} s\n",
                file=sys.stderr,
            )


def read_line() -> str:
    """Returns a line of the user's, empty at the end of input."""
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return ""


if __name__ == "__main__":
    sys.exit(main())
