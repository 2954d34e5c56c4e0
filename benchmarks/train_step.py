"""``python -m benchmarks.train_step``: the time of a training step on W1, W2 and W3, method beside method, on a CPU or a GPU.

Every method's step (forward, backward and Adam) is timed in interleaved rounds within one process; full fine-tuning as users
write it is timed twice, which shows the noise. A row has p20, p50 and p80 in milliseconds, the medians of the parts, and the
median over rounds of the ratio to full fine-tuning and to PEFT's conv LoRA with p20 and p80. ``inference`` times the adapted
and the merged model without gradients against the base. The table of blocks has each block's direct multiply-adds per second,
and those of a plain matrix product. Rows go to ``results/<device>/train_step.csv`` and ``blocks.csv``; exit code 1 if a bound
is missed.

On a GPU a step ends when the device has finished it. For such small networks launching takes longer than the kernels, so two
more rows replay the whole step of full fine-tuning and of lora_edge as a CUDA graph. Bounds and blocks are for the CPU only.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lora_edge
from lora_edge.environment.machine import describe_machine
from lora_edge.ops.engines.cpu import launch as cpu_launch

from . import write_rows
from .device import results_folder, title
from .workloads import WORKLOADS, Workload

RANK = 2
LEARNING_RATE = 1e-4
# upper bounds at batch 64: lora_edge's step over full fine-tuning's, and over PEFT's
BOUNDS = {"W1": (0.45, 0.40), "W2": (0.33, 0.30), "W3": (0.55, 0.50)}
INFERENCE_BOUNDS = {"adapted": 1.05, "merged": 1.00}
NOISE = 0.02  # in a ratio that should be 1
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d)
FIELDS = (
    "device", "lora_edge", "torch", "threads", "date", "workload", "batch", "what", "method", "rounds", "ms_p20", "ms_p50",
    "ms_p80", "forward_ms", "backward_ms", "optimizer_ms", "over_full", "over_full_p20", "over_full_p80", "over_peft",
    "over_peft_p20", "over_peft_p80",
)  # fmt: skip
BLOCK_FIELDS = (
    "device", "lora_edge", "torch", "threads", "date", "workload", "batch", "direction", "outputs", "weight", "count", "ms",
    "direct_gflops", "product_gflops",
)  # fmt: skip

Step = Callable[[], tuple[float, ...]]


def adapted_names(workload: Workload, model: nn.Module) -> list[str]:
    """The convolutions that are adapted, by name."""
    targets = workload.targets(model)
    return [n for n, m in model.named_modules() if isinstance(m, CONVOLUTIONS) and (targets is None or n in targets)]


def methods(workload: Workload) -> Iterator[tuple[str, Callable[[], nn.Module]]]:
    """Name and factory of each method's model, ready to be trained; methods that are not installed are left out."""
    yield "full", workload.model
    yield "full again", workload.model

    def channels_last() -> nn.Module:
        return workload.model().to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def compiled() -> nn.Module:
        return torch.compile(workload.model())  # type: ignore[return-value]

    def head_only() -> nn.Module:
        model = workload.model()
        head = [m for m in model.modules() if isinstance(m, nn.Linear)][-1]
        model.requires_grad_(False)
        head.requires_grad_(True)
        return model

    def ours() -> nn.Module:
        model = workload.model()
        return lora_edge.adapt(model, RANK, targets=workload.targets(model))

    if len(workload.input_shape) == 3:
        yield "full, channels-last", channels_last
    yield "full, torch.compile", compiled
    yield "frozen backbone", head_only
    try:
        import peft

        def conv_lora() -> nn.Module:
            model = workload.model()
            config = peft.LoraConfig(r=RANK, target_modules=adapted_names(workload, model))
            return peft.get_peft_model(model, config)  # type: ignore[arg-type]

        yield "PEFT conv LoRA", conv_lora
    except ImportError:
        print("PEFT is not installed: no rows of it")
    try:
        from lycoris import LycorisNetwork, create_lycoris

        def locon(bypass: bool) -> nn.Module:
            model = workload.model()
            names = adapted_names(workload, model)
            LycorisNetwork.apply_preset({"enable_conv": True, "target_module": [], "target_name": names})
            network = create_lycoris(
                model, 1.0, linear_dim=RANK, linear_alpha=RANK, conv_dim=RANK, conv_alpha=RANK, algo="locon", bypass_mode=bypass
            )
            network.apply_to()
            model.requires_grad_(False)
            model.adapters = network
            network.requires_grad_(True)
            return model

        yield "LyCORIS LoCon", lambda: locon(False)
        yield "LyCORIS LoCon, bypass", lambda: locon(True)
    except ImportError:
        print("LyCORIS is not installed: no rows of it")
    yield "lora_edge", ours


def trainer(model: nn.Module, batch: int, **options: Any) -> torch.optim.Optimizer:
    """The model in train mode, and its optimizer."""
    model.train()
    if batch == 1:  # one sample with one position has no batch variance
        for m in model.modules():
            if isinstance(m, nn.modules.batchnorm._BatchNorm):
                m.eval()
    return torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=LEARNING_RATE, **options)


def now(device: torch.device) -> float:
    """The clock, read once the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def step_of(model: nn.Module, x: Tensor, y: Tensor) -> Step:
    """A training step in train mode: seconds of forward, backward and the optimizer."""
    optimizer = trainer(model, len(x))

    def step() -> tuple[float, float, float]:
        begin = now(x.device)
        loss = F.cross_entropy(model(x), y)
        forward = now(x.device)
        loss.backward()
        backward = now(x.device)
        optimizer.step()
        optimizer.zero_grad()
        return forward - begin, backward - forward, now(x.device) - backward

    return step


def graphed_step_of(model: nn.Module, x: Tensor, y: Tensor) -> Callable[[], tuple[float]]:
    """The same step captured once as a CUDA graph and replayed."""
    optimizer = trainer(model, len(x), capturable=True)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()

    def replay(alive: Any = step) -> tuple[float]:  # the graph holds no reference to the model that it reads
        begin = now(x.device)
        graph.replay()
        return (now(x.device) - begin,)

    return replay


def interleaved(steps: dict[str, Step], rounds: int) -> dict[str, np.ndarray]:
    """Seconds ``(rounds, parts)`` of each, after two discarded rounds."""
    found: dict[str, list[tuple[float, ...]]] = {name: [] for name in steps}
    for _ in range(rounds + 2):
        for name, step in steps.items():
            found[name].append(step())
    return {name: np.array(values[2:]) for name, values in found.items()}


def rows_of(seconds: dict[str, np.ndarray], fixed: dict[str, Any]) -> list[dict[str, Any]]:
    """One row per method."""
    rows = []
    whole = {name: parts.sum(axis=1) for name, parts in seconds.items()}
    for name, parts in seconds.items():
        row = {**fixed, "method": name, "rounds": len(parts)}
        row |= dict(zip(("ms_p20", "ms_p50", "ms_p80"), _rounded(1e3 * np.percentile(whole[name], [20, 50, 80])), strict=True))
        if parts.shape[1] == 3:
            medians = _rounded(1e3 * np.median(parts, axis=0))
            row |= dict(zip(("forward_ms", "backward_ms", "optimizer_ms"), medians, strict=True))
        for other, column in (("full", "over_full"), ("base", "over_full"), ("PEFT conv LoRA", "over_peft")):
            if other in whole:
                low, middle, high = _rounded(np.percentile(whole[name] / whole[other], [20, 50, 80]))
                row |= {column: middle, f"{column}_p20": low, f"{column}_p80": high}
        rows.append(row)
    return rows


def _rounded(values: np.ndarray) -> list[float]:
    return [round(float(v), 3) for v in values]


def inference(workload: Workload, x: Tensor, rounds: int) -> dict[str, np.ndarray]:
    """The base model, the adapted and the merged one, without gradients."""
    base = workload.model().to(x.device).eval()
    adapted = copy.deepcopy(base)
    lora_edge.adapt(adapted, RANK, targets=workload.targets(adapted)).eval()
    merged = lora_edge.merge(copy.deepcopy(adapted)).eval()

    def run(model: nn.Module) -> Step:
        def step() -> tuple[float, ...]:
            begin = now(x.device)
            with torch.no_grad():
                model(x)
            return (now(x.device) - begin,)

        return step

    return interleaved({"base": run(base), "adapted": run(adapted), "merged": run(merged)}, rounds)


def profile(workload: Workload, x: Tensor, y: Tensor, steps: int, fixed: dict[str, Any]) -> list[dict[str, Any]]:
    """One row per kind of block of the CPU engine. Operations are those of a direct convolution; Winograd's does fewer."""
    model = workload.model()
    step = step_of(lora_edge.adapt(model, RANK, targets=workload.targets(model)), x, y)
    a = torch.randn(1024, 1024)
    product = min(_seconds(lambda: a @ a) for _ in range(20))
    times: dict[tuple[str, tuple[int, ...], tuple[int, ...]], list[float]] = {}
    originals: dict[str, Callable[..., Any]] = {"forward": cpu_launch.block_forward, "backward": cpu_launch.block_backward}

    def timed(direction: str) -> Callable[..., Any]:
        def run(plan: Any, tensors: Any, *arguments: Any) -> Any:
            begin = time.perf_counter()
            result = originals[direction](plan, tensors, *arguments)
            times.setdefault((direction, plan.y_shape, tuple(tensors.weight.shape)), []).append(time.perf_counter() - begin)
            return result

        return run

    try:
        cpu_launch.block_forward, cpu_launch.block_backward = timed("forward"), timed("backward")
        for _ in range(steps + 1):
            step()
    finally:
        cpu_launch.block_forward, cpu_launch.block_backward = originals["forward"], originals["backward"]
    rows = []
    for (direction, outputs, weight), seconds in times.items():
        median = float(np.median(seconds))
        operations = 2 * np.prod(outputs) * np.prod(weight[1:])
        rows.append(
            {
                **fixed, "direction": direction, "outputs": "x".join(map(str, outputs)), "weight": "x".join(map(str, weight)),
                "count": len(seconds) // (steps + 1), "ms": round(1e3 * median, 3),
                "direct_gflops": round(operations / median / 1e9, 1), "product_gflops": round(2 * 1024**3 / product / 1e9, 1),
            }
        )  # fmt: skip
    return rows


def _seconds(call: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def misses(rows: list[dict[str, Any]]) -> list[str]:
    """A message for each bound that the rows miss."""
    found = []
    for row in rows:
        place = f"{row['workload']} at batch {row['batch']}"
        if row["what"] == "inference" and row["method"] in INFERENCE_BOUNDS:
            if row["over_full"] > INFERENCE_BOUNDS[row["method"]] + NOISE:
                found.append(f"{place}: inference {row['method']} is {row['over_full']} of the base model's")
        elif row["what"] == "step" and row["method"] == "lora_edge":
            for column, bound in zip(("over_full", "over_peft"), BOUNDS[row["workload"]], strict=True):
                if row["batch"] == 64 and row.get(column, 0) > bound:
                    found.append(f"{place}: {column} is {row[column]}, bound {bound}")
            peers = [r for r in rows if all(r[k] == row[k] for k in ("workload", "batch", "what")) and r is not row]
            for peer in peers:
                if peer["ms_p50"] < row["ms_p50"] and peer["method"] != "frozen backbone":  # which trains the head only
                    found.append(f"{place}: {peer['method']} takes {peer['ms_p50']} ms, lora_edge {row['ms_p50']}")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.train_step", description=__doc__)
    parser.add_argument("--workload", nargs="+", choices=list(WORKLOADS), default=list(WORKLOADS))
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--method", nargs="+", help="only these, by name, and full fine-tuning")
    parser.add_argument("--rounds", type=int, default=15, help="at batch 64; more at smaller ones")
    parser.add_argument("--device", default="cpu", help="torch's name of the device")
    parser.add_argument("--out", type=Path, help="folder of the tables; default results/<device>")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    device = torch.device(options.device)
    is_cpu = device.type == "cpu"
    about = {key: describe_machine()[key] for key in ("lora_edge", "torch", "threads", "date")} | {"device": title(device)}
    rows: list[dict[str, Any]] = []
    blocks: list[dict[str, Any]] = []
    for name in options.workload:
        workload = WORKLOADS[name]
        for batch in options.batch:
            x, y = (tensor.to(device) for tensor in workload.batch(batch))
            fixed = {**about, "workload": name, "batch": batch}
            rounds = options.rounds * (4 if batch == 1 else 2 if batch == 8 else 1)
            steps = {}
            for method, make in methods(workload):
                if options.method and method not in ("full", *options.method):
                    continue
                torch.compiler.reset()
                format_ = torch.channels_last if method == "full, channels-last" else torch.contiguous_format
                model = make().to(device)
                steps[method] = step_of(model, x.to(memory_format=format_) if x.dim() == 4 else x, y)
                if not is_cpu and method in ("full", "lora_edge"):
                    steps[f"{method}, CUDA graph"] = graphed_step_of(make().to(device), x, y)
            measured = rows_of(interleaved(steps, rounds), {**fixed, "what": "step"})
            del steps
            measured += rows_of(inference(workload, x, rounds), {**fixed, "what": "inference"})
            rows += measured
            for row in measured:
                print(name, batch, row["what"], row["method"], row["ms_p50"], "ms", row.get("over_full"), row.get("over_peft"))
            if is_cpu and batch == max(options.batch):
                blocks += profile(workload, x, y, 5, fixed)
    folder = options.out or results_folder(device)
    write_rows(folder / "train_step.csv", FIELDS, rows)
    if not is_cpu:
        return 0
    write_rows(folder / "blocks.csv", BLOCK_FIELDS, blocks)
    for line in misses(rows):
        print("missed:", line)
    return 1 if misses(rows) else 0


if __name__ == "__main__":
    sys.exit(main())
