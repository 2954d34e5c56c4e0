"""The ``lora-edge`` command with its subcommands adapt, merge, info, check and bench; also ``python -m lora_edge``."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import sys
import warnings
from pathlib import Path
from typing import Any, NoReturn

import lora_edge
from lora_edge.environment.extras import require
from lora_edge.error_text import first_line


class OneLineParser(argparse.ArgumentParser):
    """An argparse parser that reports an error in one line on standard error; the exit code is 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return the exit code; bad input gives 2 and one line on standard error."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    if rest and options.run is not _bench:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    options.rest = rest
    warnings.filterwarnings("ignore", message="Using padding='same' with even kernel")
    try:
        code = options.run(options)
    except (ValueError, TypeError, RuntimeError, KeyError, OSError, ImportError) as error:
        print(f"lora-edge: error: {first_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("lora-edge: interrupted; files written so far are complete", file=sys.stderr)
        return 130
    return code or 0


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(prog="lora-edge", description="LoRA-Edge: adapt a pre-trained CNN by training its TT cores.")
    parser.add_argument("--version", action="version", version=f"lora_edge {lora_edge.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=OneLineParser)

    adapt = commands.add_parser("adapt", help="adapt a source model to one person and compare with other methods")
    adapt.add_argument("--data", required=True, help='an .npz (see lora_edge/har/data.py), or "watch"')
    adapt.add_argument("--target-subject", required=True, type=int, help="the person to adapt to")
    adapt.add_argument(
        "--protocol", choices=["A", "B"], default="A", help="A (default): a new user. B: a new user in another domain"
    )
    adapt.add_argument("--target-domain", help='protocol B: name or number of the target\'s domain (watch: default "left")')
    adapt.add_argument("--model", metavar="package.module:factory", help="your model (default T-ResNet)")
    adapt.add_argument("--weights", type=Path, help="the source model's weights (default: pre-train on the other people)")
    adapt.add_argument(
        "--method",
        default="lora_edge",
        help="a form of LoRA-Edge in lora_edge/methods/lora_edge.py, such as lora_edge_budget (default lora_edge)",
    )
    adapt.add_argument("--rank", type=int, default=2, help="largest rank of the TT bonds (default 2)")
    adapt.add_argument("--steps", type=int, default=50, help="Adam steps of the adaptation (default 50)")
    adapt.add_argument("--epochs", type=int, default=10, help="epochs of the pre-training (default 10)")
    adapt.add_argument("--lr", type=float, help="Adam's learning rate (default: the method's, 2e-2 for lora_edge)")
    adapt.add_argument("--seed", type=int, default=0, help="seed of all random numbers (default 0)")
    adapt.add_argument(
        "--out", required=True, type=Path, help="folder for the adapter, the merged model, the results and the picture"
    )
    adapt.set_defaults(run=_adapt)

    merge = commands.add_parser("merge", help="fuse an adapter into the base model's weights")
    merge.add_argument("base", type=Path, help="the base model's state dict, from safetensors or torch.save")
    merge.add_argument("adapter", type=Path, help="the adapter file")
    merge.add_argument("--out", required=True, type=Path, help="file for the merged state dict (safetensors)")
    merge.set_defaults(run=_merge)

    info = commands.add_parser("info", help="show what an adapter file holds")
    info.add_argument("file", type=Path, help="the adapter file")
    info.set_defaults(run=_info)

    check = commands.add_parser(
        "check", help="show which backends are available here and test their ops; exit code 1 if a test fails"
    )
    check.set_defaults(run=_check)

    bench = commands.add_parser("bench", help="time every op on every backend of this machine, layer by layer", add_help=False)
    bench.set_defaults(run=_bench)
    return parser


def _adapt(options: argparse.Namespace) -> None:
    from lora_edge.har.training import LARGEST_RATE

    _positive(options, "steps", "epochs")
    if options.lr is not None and not 0 < options.lr <= LARGEST_RATE:
        raise ValueError(f"--lr is {options.lr}; give a number above 0, at most {LARGEST_RATE:g}")
    require("lora-edge adapt")
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

    from lora_edge.har.display import print_table
    from lora_edge.har.main_job import FILES, run
    from lora_edge.har.settings import Settings

    fields = {name: value for name, value in vars(options).items() if name not in ("run", "rest")}
    columns: list[Any] = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()]
    with Progress(*columns) as bar:
        tasks: dict[str, TaskID] = {}

        def progress(title: str, done: int, total: int) -> None:
            if title not in tasks:
                tasks[title] = bar.add_task(title, total=total)
            bar.update(tasks[title], completed=done)

        report = run(Settings(**fields), progress)
    print_table(report)
    for name in FILES:
        print(f"{options.out / name}  {(options.out / name).stat().st_size / 1e3:,.1f} kB")


def _merge(options: argparse.Namespace) -> None:
    from lora_edge.adapter_format import merge_state, read_adapter
    from lora_edge.files.safetensors_file import write_safetensors
    from lora_edge.files.state_file import load_state

    state = load_state(options.base)
    merged = merge_state(state, read_adapter(options.adapter), str(options.adapter))
    write_safetensors(merged, options.out)
    print(f"{options.out}  {options.out.stat().st_size / 1e3:,.1f} kB")


def _info(options: argparse.Namespace) -> None:
    from lora_edge.adapter_format import read_adapter

    adapter = read_adapter(options.file)
    total = 0
    print(f"{options.file}: {options.file.stat().st_size:,} bytes, base {adapter.base[:12]}")
    print(", ".join(f"{name} {value}" for name, value in adapter.options.items()))
    for name, about in adapter.layers.items():
        core = adapter.tensors[f"{name}.core"]
        total += core.numel()
        print(f"  {name}: core {'x'.join(map(str, core.shape))}, rank {about['rank']}, scale {about['scale']:g}")
    for name, value in adapter.changed().items():
        print(f"  {name}: changed, {'x'.join(map(str, value.shape)) or 'one number'}")
    print(f"{len(adapter.layers)} layers, {total:,} trained parameters in the cores")


def _check(options: argparse.Namespace) -> int:
    from lora_edge.check import check

    return 0 if check() else 1


def _bench(options: argparse.Namespace) -> int:
    # The wheel holds it as lora_edge.benchmarks; in a clone it is the package benchmarks.
    installed = importlib.util.find_spec("lora_edge.benchmarks") is not None
    kernels = importlib.import_module("lora_edge.benchmarks.kernels" if installed else "benchmarks.kernels")
    return kernels.main(options.rest)


def _positive(options: argparse.Namespace, *names: str) -> None:
    for name in names:
        if getattr(options, name) < 1:
            raise ValueError(f"--{name} is {getattr(options, name)}; give an integer of at least 1")
