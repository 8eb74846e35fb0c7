"""Writes text with a language model: `functional-llm generate` from a checkout."""

import sys

from functional_llm.commands.main import run_command


def main() -> int:
    return run_command("generate", "generate.py")


if __name__ == "__main__":
    sys.exit(main())
