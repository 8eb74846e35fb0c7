"""`python -m functional_llm COMMAND`: the commands, where the program is not on the PATH."""

import sys

from functional_llm.commands.main import main

if __name__ == "__main__":
    sys.exit(main(program="python -m functional_llm"))
