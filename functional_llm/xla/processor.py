"""What the processor can do, as far as it decides which form of a product is fast."""

from dataclasses import dataclass
from functools import cache
from pathlib import Path

_CPUINFO = Path("/proc/cpuinfo")


@dataclass(frozen=True, kw_only=True)
class Processor:
    """Which instructions a processor has.

    Args:
        name: As the system says it.
        bfloat16: Products of bfloat16 with sums in float32, and conversions to bfloat16.
        amx: Products of whole tiles.
        vnni: Products of int8 with sums in int32.
    """

    name: str = "unknown"
    bfloat16: bool = False
    amx: bool = False
    vnni: bool = False


@cache
def read_processor(cpuinfo: Path = _CPUINFO) -> Processor:
    """Returns this machine's processor; one without any of it where the system does not say.

    Args:
        cpuinfo: The file in which Linux describes the processors.
    """
    try:
        lines = cpuinfo.read_text(encoding="utf-8").splitlines()
    except OSError:
        return Processor()
    fields = dict(reversed([_split(line) for line in lines]))  # of the first processor
    flags = set((fields.get("flags") or fields.get("Features") or "").split())
    return Processor(
        name=fields.get("model name", "unknown"),
        bfloat16=bool(flags & {"avx512_bf16", "amx_bf16", "bf16"}),
        amx="amx_tile" in flags,
        vnni=bool(flags & {"avx512_vnni", "avx_vnni", "asimddp"}),
    )


def _split(line: str) -> tuple[str, str]:
    key, _, value = line.partition(":")
    return key.strip(), value.strip()
