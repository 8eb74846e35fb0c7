"""Talks with a language model in the terminal: `functional-llm chat` from a checkout."""

import sys

from functional_llm.commands.main import run_command


def main() -> int:
    return run_command("chat", "chat.py")


if __name__ == "__main__":
    sys.exit(main())
