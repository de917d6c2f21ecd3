"""Every check of the contract on every method, solver and layout, and on every dtype that clients send."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from flexlora_fast.lowrank.plan import SOLVERS
from flexlora_fast.methods import METHODS
from tests import checks, checks_certificate, checks_hard
from tests.checks import Case
from tests.rounds import DTYPES, MODELS

# Slices of averaged factors do not depend on the solver, but for their spectrum: `make test-all` runs those too.
ROUTINE = ("auto", "krylov")
# The later methods take the ways of these three: one way of each as a routine, and in `make test-all` every model and
# every solver, but not every pair of them.
FIRST = ("flexlora", "fedit", "hetlora")


def marks(method: str, solver: str, model: str) -> list[pytest.MarkDecorator]:
    if method not in FIRST:
        return [pytest.mark.slow] * ((solver, model) != ("auto", "linear"))
    return [pytest.mark.slow] * (METHODS[method].output == "slice" and solver not in ROUTINE and model != "linear")


LAYOUTS = [
    pytest.param(
        Case(method, solver, model),
        id=str(Case(method, solver, model)),
        marks=marks(method, solver, model),
    )
    for method in METHODS
    for solver in ("auto", *SOLVERS)
    for model in MODELS
    if method in FIRST or solver == "auto" or model == "linear"
]
PRECISIONS = [
    pytest.param(
        Case(method, solver, "linear", dtype),
        id=str(Case(method, solver, "linear", dtype)),
        marks=[pytest.mark.slow] * (method not in FIRST and (solver, dtype) != ("krylov", "mixed")),
    )
    for method in METHODS
    for solver in ("gram", "krylov", "factored", "dense")
    for dtype in DTYPES
    if dtype != "float32"
]
ROUTES = [
    pytest.param(
        Case(method, solver, "linear"), id=str(Case(method, solver, "linear")), marks=marks(method, solver, "linear")
    )
    for method in METHODS
    for solver in ("auto", *SOLVERS)
]


@pytest.mark.parametrize("case", LAYOUTS + PRECISIONS, ids=str)
@pytest.mark.parametrize("check", checks.CHECKS + checks_certificate.CHECKS, ids=lambda check: check.__name__)
def test_contract(check: Callable[[Case], None], case: Case) -> None:
    check(case)


@pytest.mark.parametrize("case", ROUTES, ids=str)
@pytest.mark.parametrize("check", checks_hard.CHECKS, ids=lambda check: check.__name__)
def test_hard_inputs(check: Callable[[Case], None], case: Case) -> None:
    check(case)


def test_the_suite_would_notice() -> None:
    """The checks themselves can fail: a method with a wrong formula does not pass them."""
    case = Case("flexlora", "gram", "linear")
    clients = case.round()
    wrong = [c.but(scales={layer: 2 * s for layer, s in c.scales.items()}) for c in clients]
    with pytest.raises(AssertionError, match=r"off by|error"):
        checks.assert_right(case, case.aggregate(clients), wrong)
