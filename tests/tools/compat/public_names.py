"""``python public_names.py [OLDER]``: the public names of the torch it runs on that are not in the file OLDER.

A parameter of a Python function is a name too, such as ``torch.library.custom_op(tags)``. ``newer_than_2_4.txt`` is what the
newest torch has and torch 2.4 does not; by it ``tests/core/test_torch_names.py`` finds the use of a name that JetPack 6
does not have. ``make compat`` leaves both torches in build/compat, with which it is written anew:

    build/compat/aarch64/python tests/tools/compat/public_names.py > old
    build/compat/newest/bin/python tests/tools/compat/public_names.py old > tests/helpers/newer_than_2_4.txt
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# the modules and classes that a library like this one may use; a new module of newer torch is found as a name of its parent
PLACES = [f"torch{place}" for place in (
    "", ".Tensor", ".Generator", ".amp", ".autograd", ".autograd.Function", ".autograd.forward_ad", ".autograd.function",
    ".autograd.functional", ".autograd.graph", ".autograd.profiler", ".backends", ".backends.cpu", ".backends.cuda",
    ".backends.cudnn", ".backends.mkldnn", ".backends.openmp", ".compiler", ".cpu", ".cuda", ".export", ".func", ".fx",
    ".fx.Graph", ".fx.GraphModule", ".fx.Tracer", ".jit", ".library", ".library.CustomOpDef", ".linalg", ".multiprocessing",
    ".nn", ".nn.Module", ".nn.functional", ".nn.init", ".nn.utils", ".nn.utils.fusion", ".nn.utils.parametrizations",
    ".nn.utils.parametrize", ".onnx", ".optim", ".optim.swa_utils", ".overrides", ".profiler", ".random", ".serialization",
    ".sparse", ".special", ".testing", ".utils", ".utils.benchmark", ".utils.checkpoint", ".utils.data", ".utils.flop_counter",
    ".utils.hooks",
)]  # fmt: skip


def public_names() -> Iterator[str]:
    places = {place: found for place in PLACES if (found := _object(place)) is not None}
    for place, found in places.items():
        for name in sorted({*dir(found), *dir(type(found))} if inspect.ismodule(found) else dir(found)):
            if name.startswith("_") or name == "TYPE_CHECKING":
                continue
            value = getattr(found, name, None)
            home = value.__name__ if inspect.ismodule(value) else getattr(value, "__module__", None) or "torch"
            if not home.startswith(place if inspect.ismodule(value) else "torch"):
                continue  # what a module imports is no part of it
            yield f"{place}.{name}"
            with contextlib.suppress(TypeError, ValueError):
                function = value.__init__ if inspect.isclass(value) else value
                if not inspect.isfunction(function):
                    continue  # of functions in C++ only newer versions tell their parameters
                for parameter in inspect.signature(function).parameters.values():
                    if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
                        yield f"{place}.{name}({parameter.name})"


def _object(place: str) -> Any:
    with contextlib.suppress(ImportError):
        return importlib.import_module(place)
    parent, _, name = place.rpartition(".")
    return getattr(_object(parent), name, None)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    older = set(Path(sys.argv[1]).read_text().split()) if len(sys.argv) > 1 else set()
    names = {name for name in public_names() if name not in older and not name.endswith("(self)")}
    # the parameters of a function that is new itself say nothing more
    print("\n".join(sorted(name for name in names if not older or name.partition("(")[0] not in names - {name})))
