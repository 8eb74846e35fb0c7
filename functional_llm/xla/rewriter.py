"""Programs that XLA compiles badly, rewritten after they are traced.

What a program has of that is known once it is traced. So the rules apply to the jaxpr, whoever has
written it: a layer, an adapter, a gradient. The graph knows nothing of it, and other platforms get
the program as it was. `RULES`, or `GPU_RULES`, are tried in order; the docstring of each says what
XLA does without it. `python -m benchmarks.cpu_rules` measures each of those for CPUs,
`python -m benchmarks.gpu_programs` counts what GPUs run.

Reference:
    [Writing custom interpreters in JAX](https://docs.jax.dev/en/latest/notebooks/Writing_custom_interpreters_in_Jax.html).
"""

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, ParamSpec, TypeAlias, TypeVar

import jax

from functional_llm.xla.axis_order import (
    Axes,
    Reordered,
    Value,
    from_loop_form,
    in_program_order,
    loop_form,
)
from functional_llm.xla.gpu_rules import GPU_RULES
from functional_llm.xla.jax_private import (
    PROGRAMS,
    Literal,
    OpenProgram,
    Program,
    Variable,
    bind_again,
    dot_general_p,
)
from functional_llm.xla.order_rules import ORDER_RULES
from functional_llm.xla.processor import Processor, read_processor
from functional_llm.xla.product_rules import PRODUCT_RULES
from functional_llm.xla.rule import ProductRule, Rule, StepRule
from functional_llm.xla.steps import Product, Source, Step

# Before it, JAX binds an equation otherwise, and XLA lacks a product of bfloat16 that is made here.
OLDEST_JAX = (0, 9, 2)
RULES: tuple[Rule, ...] = (*ORDER_RULES, *PRODUCT_RULES)
Inputs = ParamSpec("Inputs")
Result = TypeVar("Result")


def optimize_for_cpu(
    function: Callable[Inputs, Result],
    rules: Sequence[Rule] | None = None,
    processor: Processor | None = None,
) -> Callable[Inputs, Result]:
    """Returns a function that computes the same, in a form that is fast on the processor.

    The same but for the order and the precision of sums; on processors with instructions for
    bfloat16, several rows of float32 beside an int8 matrix are rounded to it. To be compiled by
    `jax.jit`; a transformation such as `jax.grad` goes inside. On other platforms, and with a JAX
    before `OLDEST_JAX`, it is the function itself.

    Args:
        function: A function from nested structures of arrays to another.
        rules: What is exchanged, tried in order; by default `RULES`.
        processor: By default this machine's.
    """
    if jax.default_backend() != "cpu" or jax.__version_info__ < OLDEST_JAX:
        return function
    return _rewritten(function, RULES if rules is None else rules, processor)


def optimize_for_gpu(function: Callable[Inputs, Result]) -> Callable[Inputs, Result]:
    """Returns a function that computes the same, in a form that is fast on GPUs.

    To be compiled by `jax.jit`. On other platforms, and with a JAX before `OLDEST_JAX`, it is the
    function itself.
    """
    if jax.default_backend() != "gpu" or jax.__version_info__ < OLDEST_JAX:
        return function
    return _rewritten(function, GPU_RULES, None)


def _rewritten(
    function: Callable[Inputs, Result], rules: Sequence[Rule], processor: Processor | None
) -> Callable[Inputs, Result]:
    @wraps(function)
    def optimized(*args: Inputs.args, **kwargs: Inputs.kwargs) -> Result:
        traced = jax.jit(function).trace(*args, **kwargs)
        rewriter = Rewriter(rules, processor or read_processor())
        outputs = rewriter.run(traced.jaxpr, *jax.tree.leaves((args, kwargs)))
        arrays = [in_program_order(x) for x in outputs]
        return jax.tree.unflatten(jax.tree.structure(traced.out_info), arrays)

    return optimized


def compiler_options() -> dict[str, bool | int | str]:
    """Returns what `jax.jit` is to be told besides, for the platform that it compiles for.

    On CPUs, XLA takes vectors of half the width that the newer ones compute with as fast.
    """
    return {"xla_cpu_prefer_vector_width": 512} if jax.default_backend() == "cpu" else {}


def options_for_short_rows() -> dict[str, bool | int | str]:
    """Returns what `jax.jit` is to be told for programs that sum many short rows.

    On CPUs, XLA's library for sums, of JAX 0.8.1 and later, takes three times as long for these as
    XLA itself does.
    """
    has_library = jax.default_backend() == "cpu" and jax.__version_info__ >= (0, 8, 1)
    return {"xla_cpu_experimental_ynn_fusion_type": ""} if has_library else {}


class Rewriter:
    """Evaluates programs, step by step, by the first rule that matches.

    Args:
        rules: Rules in order.
        processor: What they are to suit.
    """

    def __init__(self, rules: Sequence[Rule], processor: Processor) -> None:
        self._step_rules = [rule for rule in rules if isinstance(rule, StepRule)]
        self._product_rules = [rule for rule in rules if isinstance(rule, ProductRule)]
        self._processor = processor
        self._num_rewritten = 0
        # By id: a program, kept that its id is not used again, and what it has become.
        self._known: dict[int, tuple[Any, Any]] = {}
        self._functions: dict[Any, _Function] = {}

    def run(self, program: Program, *inputs: Value) -> list[Value]:
        """Returns the results of a program, with inputs in whatever order of axes."""
        jaxpr = program.jaxpr
        values: dict[Variable, Value] = dict(zip(jaxpr.constvars, program.consts, strict=True))
        values |= zip(jaxpr.invars, inputs, strict=True)
        sources: dict[Variable, Source] = {}

        def read(x: Variable | Literal) -> Value:
            return x.val if isinstance(x, Literal) else values[x]

        for equation in jaxpr.eqns:
            origins = [None if isinstance(x, Literal) else sources.get(x) for x in equation.invars]
            step = Step(equation, [read(x) for x in equation.invars], origins)
            values |= zip(equation.outvars, self._step(step), strict=True)
            source = step.result_source()
            if source is not None:
                sources[equation.outvars[0]] = source
        return [read(x) for x in jaxpr.outvars]

    def call(self, program: Program, *inputs: Value) -> list[Value]:
        """Returns what `run` does, by a function that is traced once for all calls of a program."""
        forms = _forms(inputs)
        key = id(program), *forms
        if key not in self._functions:
            self._functions[key] = _Function(self, program, forms)
        return self._functions[key](inputs)

    def product(self, product: Product) -> jax.Array:
        """Returns the result of a product."""
        for rule in self._product_rules:
            if rule.matches(product, self._processor):
                self._num_rewritten += 1
                return rule.rewrite(product, self)
        return product.compute()

    def _step(self, step: Step) -> Sequence[Value]:
        for rule in self._step_rules:
            if rule.matches(step, self._processor):
                self._num_rewritten += 1
                return rule.rewrite(step, self)
        if step.has_reordered:
            return self._step(step.in_program_order())
        if step.equation.primitive is dot_general_p:
            return [self.product(Product.of_step(step))]
        params = {name: self._rewritten(x) for name, x in step.equation.params.items()}
        return bind_again(step.equation, step.arrays, params)

    def _rewritten(self, value: Any) -> Any:
        """Returns a parameter with the programs in it rewritten; the same if no rule matches."""
        if isinstance(value, (tuple, list)) and any(isinstance(x, PROGRAMS) for x in value):
            return type(value)(self._rewritten(x) for x in value)
        if not isinstance(value, PROGRAMS):
            return value
        if id(value) not in self._known:
            before = self._num_rewritten
            new = self._trace(value)
            self._known[id(value)] = value, value if self._num_rewritten == before else new
        elif self._known[id(value)][1] is not value:
            self._num_rewritten += 1
        return self._known[id(value)][1]

    def _trace(self, program: Program | OpenProgram) -> Program | OpenProgram:
        closed = program if isinstance(program, Program) else Program(program, ())

        def run(*inputs: jax.Array) -> list[jax.Array]:
            return [in_program_order(x) for x in self.run(closed, *inputs)]

        new = jax.make_jaxpr(run)(*closed.in_avals)
        return new if program is closed else new.jaxpr


_Form: TypeAlias = tuple[Axes, jax.ShapeDtypeStruct] | None  # of a value that is in another order


def _forms(values: Sequence[Value]) -> tuple[_Form, ...]:
    return tuple((x.order, x.program_shape) if isinstance(x, Reordered) else None for x in values)


def _to_arrays(values: Sequence[Value]) -> list[jax.Array]:
    return [loop_form(x) if isinstance(x, Reordered) else x for x in values]


def _from_arrays(arrays: Sequence[jax.Array], forms: Sequence[_Form]) -> list[Value]:
    pairs = zip(arrays, forms, strict=True)
    return [x if form is None else from_loop_form(x, *form) for x, form in pairs]


class _Function:
    """A program inside a program, rewritten once for all calls with inputs in these orders.

    Args:
        rewriter: What rewrites it.
        program: The program.
        forms: Of its inputs.
    """

    def __init__(self, rewriter: Rewriter, program: Program, forms: Sequence[_Form]) -> None:
        self.program = program  # kept, that its id is not used again

        def run(*arrays: jax.Array) -> list[jax.Array]:
            values = rewriter.run(program, *_from_arrays(arrays, forms))
            self._results = _forms(values)
            return _to_arrays(values)

        self._run = jax.jit(run)

    def __call__(self, inputs: Sequence[Value]) -> list[Value]:
        return _from_arrays(self._run(*_to_arrays(inputs)), self._results)
