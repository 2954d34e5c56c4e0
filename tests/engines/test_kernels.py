"""The compiled kernels against float64: every launch of the case matrix on the emulator, and on a CUDA device if there is one.

On the emulator each launch runs under 20 schedules with the address and undefined-behaviour sanitizers, its outputs poisoned
first; a race, an access out of bounds, a value that depends on the schedule or a byte that is never written is an error.
"""

# Only parametrised items have a callspec, which mypy does not see.
# mypy: disable-error-code="attr-defined"
from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor

from helpers import emulator
from helpers.kernel_cases import Launch, launches
from lora_edge.environment import extension as _extension

SCHEDULES = 20
LAUNCHES = {launch.name: launch for launch in launches()}
pytestmark = pytest.mark.slow  # about 2 minutes


def _job(launch: Launch) -> emulator.Job:
    return emulator.Job(launch.name, launch.op, launch.fields, launch.inputs, launch.outputs, launch.scratch, SCHEDULES)


@pytest.fixture(scope="session")
def emulated_results(request: pytest.FixtureRequest) -> dict[str, emulator.Result]:
    """The results of every launch that this session tests, from two processes."""
    wanted = [
        item.callspec.params["name"]
        for item in request.session.items
        if "emulated_results" in getattr(item, "fixturenames", ())
    ]
    runner = emulator.build(sanitize=True)
    jobs = [_job(LAUNCHES[name]) for name in wanted]
    with ThreadPoolExecutor(2) as pool:
        halves = pool.map(lambda part: emulator.run(part, runner), (jobs[0::2], jobs[1::2]))
        return {result.job.name: result for half in halves for result in half}


@pytest.mark.parametrize("name", LAUNCHES)
def test_on_the_emulator(name: str, emulated_results: dict[str, emulator.Result]) -> None:
    result = emulated_results[name]
    assert result.refused is None
    assert result.error is None
    _check(LAUNCHES[name], result.outputs)


def test_wide_cases_are_wide_on_the_emulator(tmp_path: Path) -> None:
    runner = emulator.build(sanitize=True)
    for name, launch in LAUNCHES.items():
        if name.startswith("forward: wide, "):
            launches = emulator.trace(_job(launch), lambda _: [], tmp_path, runner).launches
            assert [found["threads"] for found in launches if "tt_block_forward" in found["kernel"]] == [256], name


def _check(launch: Launch, outputs: dict[str, Tensor]) -> None:
    errors = launch.errors(outputs)
    assert all(error <= launch.tolerance[name] for name, error in errors.items()), errors


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", LAUNCHES)
def test_on_the_device(name: str) -> None:
    launch, extension = LAUNCHES[name], _extension.load()
    plan = extension.Plan(**launch.fields)
    tensors = {key: _on_device(value) for key, value in launch.inputs.items()}
    tensors |= {key: _poisoned(value) for key, value in launch.outputs.items()}
    sizes = plan.scratch()
    for key in launch.scratch:
        direction = "forward" if "forward" in launch.op else "backward"
        name_of_size = {"packed": f"packed_{direction}", "partial": "fuse_partial" if "fuse" in launch.op else "partial"}[key]
        tensors[key] = torch.full((max(1, sizes[name_of_size]),), 255, dtype=torch.uint8, device="cuda")
    strides = {}
    for key in emulator.STRIDED:
        if key in tensors:
            tensor = tensors[key] if tensors[key].dim() == 4 else tensors[key].unsqueeze(2)
            strides |= {f"{key}_{axis}": stride for axis, stride in zip("nchw", tensor.stride(), strict=True)}
    fields = extension.call_fields(launch.op)
    places = {key: tensor.data_ptr() for key, tensor in tensors.items()}
    places |= {f"{key}_bytes": _bytes_from_there(tensor) for key, tensor in tensors.items()}
    values = (strides[f] if f in strides else places.get(f, 0) for f in fields)
    getattr(plan, launch.op)(tuple(values), 0, torch.cuda.current_stream().cuda_stream)
    torch.cuda.synchronize()
    _check(launch, {key: tensors[key].cpu() for key in launch.outputs})


def _on_device(value: Tensor) -> Tensor:
    """A copy with the same strides and the same distance from alignment."""
    span = 1 + sum((size - 1) * stride for size, stride in zip(value.shape, value.stride(), strict=True))
    storage = torch.empty(value.storage_offset() + span, dtype=value.dtype, device="cuda")
    storage[value.storage_offset() :] = value.as_strided((span,), (1,)).cuda()
    return storage.as_strided(value.shape, value.stride(), value.storage_offset())


def _bytes_from_there(tensor: Tensor) -> int:
    return tensor.untyped_storage().nbytes() - tensor.storage_offset() * tensor.element_size()


def _poisoned(value: Tensor) -> Tensor:
    result = _on_device(value)
    return result.fill_(float("nan") if value.is_floating_point() else 255)
