"""Measures functional_llm and its peers on the same weights, in turns: `python -m benchmarks`."""
