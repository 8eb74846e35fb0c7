"""Sharding: one model on a mesh of devices, laid out by what its layers are.

May import: graph, presets, training.

Offers: `mesh`, `layout` and the `Layout` that it returns, a `keras.distribution.ModelParallel`;
`join_processes`, for the devices of several processes.
Keras and JAX do the rest: loading, training, generation and adapters ask the layout that is set.
"""

from functional_llm.sharding.layout import Layout, layout
from functional_llm.sharding.mesh import mesh
from functional_llm.training.processes import join_processes

__all__ = ["Layout", "join_processes", "layout", "mesh"]
