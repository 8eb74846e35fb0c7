"""What a rule is: a condition, and what it puts in the place of what meets the condition."""

from abc import ABC, abstractmethod
from inspect import getdoc
from typing import ClassVar, Protocol

import jax

from functional_llm.xla.axis_order import Value
from functional_llm.xla.jax_private import Program
from functional_llm.xla.processor import Processor
from functional_llm.xla.steps import Product, Step


class Again(Protocol):
    """What computes the rest of a rewriting, by the same rules."""

    def product(self, product: Product) -> jax.Array:
        """Returns the result of a product."""

    def run(self, program: Program, *inputs: Value) -> list[Value]:
        """Returns the results of a program, with inputs in whatever order of axes."""

    def call(self, program: Program, *inputs: Value) -> list[Value]:
        """Returns what `run` does, by a function that is traced once for all calls of a program."""


class Rule(ABC):
    """One exchange. Its docstring says what XLA does without it.

    The condition is static: it reads shapes, dtypes, axes and the processor, never a number.
    """

    name: ClassVar[str]

    @property
    def why(self) -> str:
        """The reason for the rule."""
        return getdoc(type(self)) or ""


class StepRule(Rule):
    """A rule about one step of a program."""

    @abstractmethod
    def matches(self, step: Step, processor: Processor) -> bool:
        """Whether the rule applies to a step."""

    @abstractmethod
    def rewrite(self, step: Step, again: Again) -> list[Value]:
        """Returns the step's results."""


class ProductRule(Rule):
    """A rule about one product.

    What `rewrite` asks `again` for is another product, and one that the rule does not match.
    """

    @abstractmethod
    def matches(self, product: Product, processor: Processor) -> bool:
        """Whether the rule applies to a product."""

    @abstractmethod
    def rewrite(self, product: Product, again: Again) -> jax.Array:
        """Returns the product's result."""
