"""CPU programs: what XLA compiles badly on CPUs is exchanged in a traced program.

May import: no other room.

Offers: `optimize_for_cpu`, `compiler_options`.
"""
