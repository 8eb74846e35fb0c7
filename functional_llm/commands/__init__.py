"""Commands: what a terminal offers, one module each, listed in `main.py`.

May import: every room above.

Offers: `main`, the program `functional-llm`. A module says its options without importing JAX, which
`--help` and mistakes need not wait for; what its `run` needs, it imports there.
"""
