"""Graphs: everything that works on any Keras graph and knows no language model.

May import: no other room.

Offers: `CompositeLayer`; `walk`, `select`; `rewire`, `shared_copy`; `Freezable`, `KeepsValues`;
`capture`; `same_graph`; `tree_view`, `plot`, `explore`; `require_jax`; `keras_private` and
`keras_values`, the pages that know Keras's insides.
"""
