"""The Triton kernels against float64, launch by launch of the case matrix, in the interpreter; outputs are poisoned first."""

from __future__ import annotations

import pytest

from helpers.kernel_cases import launches
from helpers.triton_launches import run

LAUNCHES = {launch.name: launch for launch in launches()}


@pytest.mark.parametrize("name", LAUNCHES)
def test_on_the_interpreter(name: str) -> None:
    launch = LAUNCHES[name]
    errors = launch.errors(run(launch, "cpu"))
    assert all(error <= launch.tolerance[output] for output, error in errors.items()), errors
