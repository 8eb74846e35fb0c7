"""Tokenizers as TensorFlow operations: `TextTokenizer.as_tf`.

What a tokenizer does is read and compiled without TensorFlow (`refusal`, `patterns`, `plan`); what
imports it (`tokenizer` and those that it imports) is imported when it is asked for.
"""
