"""Fine-tunes a language model on a dataset: `functional-llm finetune` from a checkout."""

import sys

from functional_llm.commands.main import run_command


def main() -> int:
    return run_command("finetune", "finetune.py")


if __name__ == "__main__":
    sys.exit(main())
