"""CPU programs: what XLA compiles badly on CPUs is exchanged in a traced program.

May import: no other room.

Offers: `optimize_for_cpu`, `compiler_options`; `jax_private`, all that the package uses of JAX
under names that JAX does not promise to keep.
"""
