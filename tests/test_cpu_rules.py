"""The list of the CPU rewriter's rules, and what chooses among them."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from functional_llm.xla.processor import Processor, read_processor
from functional_llm.xla.rewriter import RULES, optimize_for_cpu
from functional_llm.xla.rule import ProductRule, StepRule

pytestmark = pytest.mark.skipif(jax.default_backend() != "cpu", reason="others need no exchange")


def test_rules_have_names_and_reasons_and_are_of_one_kind() -> None:
    names = [rule.name for rule in RULES]
    assert len(set(names)) == len(names) > 10
    assert all(len(rule.why) > 20 for rule in RULES)
    assert all(isinstance(rule, StepRule) != isinstance(rule, ProductRule) for rule in RULES)


def test_without_rules_a_program_stays_as_it_is() -> None:
    def function(x: Any, y: Any) -> Any:
        return jax.grad(lambda x: jnp.sum(jnp.tanh(x @ y).astype("float32")))(x)

    x, y = (jnp.ones(shape, "bfloat16") for shape in ((1, 24), (24, 40)))
    program = jax.make_jaxpr(optimize_for_cpu(function, rules=()))(x, y)
    expected = [equation.primitive for equation in jax.make_jaxpr(function)(x, y).eqns]
    assert [equation.primitive for equation in program.eqns] == expected


@pytest.mark.parametrize("name", ["two_rows", "float32_sums", "transposed_matrix"])
def test_a_rule_can_be_left_out(name: str) -> None:
    def function(x: Any, y: Any) -> Any:
        return x @ y.T

    random = np.random.default_rng(0)
    x, y = (jnp.asarray(random.normal(size=n), "bfloat16") for n in ((1, 24), (100, 24)))
    rules = [rule for rule in RULES if rule.name != name]
    with_all, without = (
        str(jax.make_jaxpr(optimize_for_cpu(function, chosen, Processor(bfloat16=True)))(x, y))
        for chosen in (RULES, rules)
    )
    assert with_all != without
    result = jax.jit(optimize_for_cpu(function, rules))(x, y)
    np.testing.assert_allclose(
        np.asarray(result, "float32"), np.asarray(function(x, y), "float32"), atol=0.2
    )


def test_the_processor_is_read(tmp_path: Path) -> None:
    file = tmp_path / "cpuinfo"
    file.write_text(
        "processor\t: 0\nmodel name\t: A\nflags\t: avx512f avx512_vnni\n\n"
        "processor\t: 1\nmodel name\t: B\nflags\t: avx512_bf16 amx_tile\n"
    )
    assert read_processor(file) == Processor(name="A", vnni=True)
    other = tmp_path / "arm"
    other.write_text("processor\t: 0\nFeatures\t: fp asimd bf16\n")
    assert read_processor(other) == Processor(bfloat16=True)
    assert read_processor(tmp_path / "nowhere") == Processor()
