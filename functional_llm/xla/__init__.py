"""What XLA compiles badly is exchanged in a traced program: rules for CPUs, rules for GPUs.

May import: no other room.

Offers: `optimize_for_cpu`, `optimize_for_gpu`, `compiler_options`; `jax_private`, all that the
package uses of JAX under names that JAX does not promise to keep.
"""
