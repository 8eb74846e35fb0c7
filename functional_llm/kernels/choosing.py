"""The choice among kernels: the first that can and does not lose, or the one that is asked for."""

from collections.abc import Callable, Iterable
from typing import Any, Protocol, TypeVar


class Kernel(Protocol):
    """What a choice asks of a kernel; each answer is a reason, or `None`."""

    @property
    def name(self) -> str:
        """What users call it."""

    @property
    def obstacle(self) -> Callable[[Any], str | None]:
        """Facts of a call -> why the kernel cannot compute it."""

    @property
    def loses(self) -> Callable[[Any], str | None]:
        """Facts of a call -> why another one is better."""


AnyKernel = TypeVar("AnyKernel", bound=Kernel)


def choose(
    kernels: Iterable[AnyKernel], facts: object, what: str, name: str | None = None
) -> tuple[AnyKernel, str]:
    """Returns the first kernel that can and does not lose, and the reason.

    Args:
        kernels: The first choice first.
        facts: Of the call.
        what: What kernels they are, for messages.
        name: The kernel that a user asks for.

    Raises:
        ValueError: If there is no kernel of this name, or it cannot compute this.
    """
    if name is not None:
        return _asked_for(list(kernels), facts, what, name), "it was asked for"
    passed: list[str] = []
    for kernel in kernels:
        reason = kernel.obstacle(facts) or kernel.loses(facts)
        if reason is None:
            return kernel, "; ".join(passed) or "it is the first choice"
        passed.append(f"not {kernel.name}, because {reason}")
    raise ValueError(f"No {what} can compute this: {'; '.join(passed)}.")


def _asked_for(kernels: list[AnyKernel], facts: object, what: str, name: str) -> AnyKernel:
    kernel = next((kernel for kernel in kernels if kernel.name == name), None)
    if kernel is None:
        known = [kernel.name for kernel in kernels]
        raise ValueError(f"Expected a name of {known} for the {what}, received {name!r}.")
    reason = kernel.obstacle(facts)
    if reason is not None:
        raise ValueError(
            f"The {what} {name!r} cannot compute this, because {reason}. Ask for another one, or "
            "for none: then the best that can is taken."
        )
    return kernel
