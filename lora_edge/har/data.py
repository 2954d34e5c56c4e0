"""Activity data: the watch set, your own ``.npz``, and the splits of protocols A and B.

Your own data is one ``.npz`` with

    X          (windows, channels, time) float   sensor windows in recording order; finite, magnitudes below 1e18
    y          (windows,) int                    class, 0 .. C-1
    subject    (windows,) int                    person
    domain     (windows,) int                    optional: wrist, device or place; default 0
    recording  (windows,) int                    optional: recording; default: one per subject, domain and class
    session    (windows,) int                    optional: repetition; a subject's repetitions in a domain then form one
                                                 recording, which is split only between repetitions
    classes, channels, domains   (names,) str    optional names; channels has one distinct name per channel of X

Windows of one recording are split by time, never shuffled: the first 30 % adapt, the last 50 % test. The gap between them is
unused, so that no sample is on both sides.
"""

from __future__ import annotations

import hashlib
import importlib.util
import io
import os
import pickle
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from lora_edge.files.file_kind import NPZ, kind_of, require_file

WATCH_SHA256 = "eb122f23cdf06ef6bd6c6c5312958ec5cf9d038e2e6d457b8081662c75a42537"
WATCH_WINDOW, WATCH_STEP = 100, 50  # samples at 50 Hz: 2 s with half overlap
ADAPT_SHARE, TEST_SHARE = 0.3, 0.5
LARGEST = 1e18  # exclusive bound on window values: sums of larger squares overflow float32


@dataclass(frozen=True)
class Windows:
    """Labelled sensor windows.

    Attributes:
        x: ``(N, channels, time)`` float32.
        y: ``(N,)`` int64 class.
        subject: ``(N,)`` int64.
        domain: ``(N,)`` int64, index into ``domains``.
        position: ``(N, 2)`` float64, start and end of the window as shares of its recording.
        classes, channels, domains: names.
    """

    x: np.ndarray
    y: np.ndarray
    subject: np.ndarray
    domain: np.ndarray
    position: np.ndarray
    classes: list[str]
    channels: list[str]
    domains: list[str]

    def __len__(self) -> int:
        return len(self.y)

    def where(self, mask: np.ndarray) -> Windows:
        """Return the windows that ``mask`` selects."""
        return Windows(
            self.x[mask], self.y[mask], self.subject[mask], self.domain[mask], self.position[mask],
            self.classes, self.channels, self.domains,
        )  # fmt: skip

    def domain_index(self, domain: str | int) -> int:
        """Return the index of a domain given by name or number; ValueError if the data do not have it."""
        if isinstance(domain, str) and domain in self.domains:
            return self.domains.index(domain)
        if str(domain).isdigit() and int(domain) < len(self.domains):
            return int(domain)
        raise ValueError(f"domain {domain!r} is not in the data; it has {', '.join(self.domains)}")


@dataclass(frozen=True)
class Split:
    """The split for one target person, normalised with the source's statistics."""

    source: Windows
    adapt: Windows
    test: Windows
    mean: np.ndarray
    std: np.ndarray
    protocol: str
    target: int


def installed_file(package: str, path: str, install: str) -> Path:
    """Return the path of a file in an installed package, without importing the package.

    Args:
        package: import name of the package.
        path: relative to the package.
        install: the command that installs the package, for the message.

    Raises:
        ValueError: the package is not installed or has no such file.
    """
    spec = importlib.util.find_spec(package)
    for folder in (spec.submodule_search_locations or []) if spec is not None else []:
        if (Path(folder) / path).is_file():
            return Path(folder) / path
    raise ValueError(f"{package}/{path} is not installed; run {install}")


def load_watch() -> Windows:
    """Load seglearn 1.2.5's ``watch`` set in 2 s windows: 4,677 of shape ``(6, 100)``, 10 people, both wrists, 7 exercises.

    Raises:
        ValueError: seglearn is not installed, or its file has an unexpected checksum.
    """
    path = installed_file("seglearn", "data/watch_dataset.npy", 'pip install "lora_edge[har]"')
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}; reinstall seglearn==1.2.5") from None
    digest = hashlib.sha256(raw).hexdigest()
    if digest != WATCH_SHA256:
        raise ValueError(f"{path}: its SHA-256 is {digest[:8]}..., not {WATCH_SHA256[:8]}...; install seglearn==1.2.5")
    data = np.load(io.BytesIO(raw), allow_pickle=True).item()  # unpickled only after the check above
    x, position, index = [], [], []
    for k, recording in enumerate(data["X"]):
        for first in range(0, len(recording) - WATCH_WINDOW + 1, WATCH_STEP):
            x.append(recording[first : first + WATCH_WINDOW].T)
            position.append((first / len(recording), (first + WATCH_WINDOW) / len(recording)))
            index.append(k)
    return Windows(
        x=np.stack(x).astype(np.float32),
        y=np.asarray(data["y"], np.int64)[index],
        subject=np.asarray(data["subject"], np.int64)[index],
        domain=np.asarray(data["side"], np.int64)[index],
        position=np.asarray(position),
        classes=list(data["y_labels"]),
        channels=list(data["X_labels"]),
        domains=["left", "right"],
    )


def load_npz(path: str | os.PathLike[str]) -> Windows:
    """Load your own data in the format described at the top of this module.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not an ``.npz``, a key is missing, sizes or names do not fit, a label is out of range, or a window
            holds NaN, infinity or a magnitude of 1e18 or more.
    """
    require_file(path, 'give an .npz, or "watch" for the data set of seglearn')
    if (kind := kind_of(path)) != NPZ:
        raise ValueError(f"{path}: not a readable .npz, but {kind}; give one with X, y and subject, saved by numpy.savez")
    try:
        with np.load(path, allow_pickle=False) as file:
            data = {key: file[key] for key in file.files}
    except (ValueError, OSError, EOFError, AttributeError, pickle.UnpicklingError) as error:
        raise ValueError(f"{path}: not a readable .npz ({str(error).splitlines()[0]}); save it with numpy.savez") from None
    except Exception as error:  # zipfile.BadZipFile, zlib.error: a damaged archive
        raise ValueError(f"{path}: a damaged .npz ({error}); save it again") from None
    for key in ("X", "y", "subject"):
        if key not in data:
            raise ValueError(f"{path}: has no {key!r}; it must have X (windows, channels, time), y and subject")
    x = data["X"]
    if x.ndim != 3 or not np.issubdtype(x.dtype, np.floating):
        raise ValueError(f"{path}: X is {x.dtype} {x.shape}; give floats of shape (windows, channels, time)")
    columns = {}
    for key in ("y", "subject", "domain", "recording", "session"):
        column = data.get(key, np.zeros(len(x), np.int64))
        if column.shape != (len(x),) or not np.issubdtype(column.dtype, np.integer):
            raise ValueError(f"{path}: {key} is {column.dtype} {column.shape}; give integers of shape ({len(x)},)")
        columns[key] = column.astype(np.int64)
    channels = _names(data, "channels", x.shape[1], path)
    _check_channels(channels, x.shape, path)
    _check_values(x, channels, str(path))  # before the cast to float32, which makes large values infinite
    windows = Windows(
        x=x.astype(np.float32),
        y=columns["y"],
        subject=columns["subject"],
        domain=columns["domain"],
        position=_positions(columns, {"recording", "session"} & set(data)),
        classes=_names(data, "classes", int(columns["y"].max(initial=0)) + 1, path),
        channels=channels,
        domains=_names(data, "domains", int(columns["domain"].max(initial=0)) + 1, path),
    )
    check_windows(windows, str(path))
    return windows


def check_windows(windows: Windows, name: str) -> None:
    """Raise ValueError if labels or domains are out of range, or a window holds NaN, infinity or a magnitude over 1e18."""
    if len(windows) == 0:
        raise ValueError(f"{name}: holds no windows; give at least one")
    for what, values, names in (("y", windows.y, windows.classes), ("domain", windows.domain, windows.domains)):
        if values.min() < 0 or values.max() >= len(names):
            odd = values[(values < 0) | (values >= len(names))][0]
            raise ValueError(f"{name}: {what} holds {odd}; labels run from 0 to {len(names) - 1}")
    _check_values(windows.x, windows.channels, name)


def _check_values(x: np.ndarray, channels: list[str], name: str, scaled: str = "") -> None:
    """Raise ValueError for the first window with an unusable value; ``scaled`` says how the values were scaled, if at all."""
    finite = np.isfinite(x).all(axis=(1, 2))
    if not finite.all():
        raise ValueError(f"{name}: window {int(np.argmin(finite))} holds NaN or Inf ({(~finite).sum()} do); clean or drop them")
    size = np.abs(x).max(axis=2, initial=0)
    if size.size and size.max() >= LARGEST:
        row, channel = np.unravel_index(int(np.argmax(size >= LARGEST)), size.shape)
        raise ValueError(
            f"{name}: window {row} holds {size[row, channel]:.3g} in channel {channels[channel]}{scaled} "
            f"({(size >= LARGEST).any(axis=1).sum()} such windows); values must be below {LARGEST:g}, clean or drop them"
        )


def _check_channels(channels: list[str], shape: tuple[int, ...], path: str | os.PathLike[str]) -> None:
    """Raise ValueError if the names do not fit X, or X has no channels or no samples."""
    if 0 in shape[1:]:
        raise ValueError(f"{path}: X has shape {shape}; give at least one channel and one sample of time")
    if len(channels) != shape[1]:
        swapped = len(channels) == shape[2]
        remedy = "swap its axes by X.transpose(0, 2, 1)" if swapped else "give one name per channel"
        raise ValueError(
            f"{path}: channels has {len(channels)} names, but X of shape {shape} has {shape[1]} channels (its second axis); "
            f"{remedy}"
        )
    for place, name in enumerate(channels):
        if name in channels[:place]:
            raise ValueError(f"{path}: channels names {name!r} twice; give each channel a distinct name")


def split(windows: Windows, target: int, protocol: str = "A", target_domain: str | int | None = None) -> Split:
    """Split the windows for one target person.

    Args:
        windows: all people.
        target: the subject to adapt to.
        protocol: "A", a new user: the source is everybody else in every domain. "B", a new user in another domain: the source
            is everybody else in the other domains, the target is this person in ``target_domain``.
        target_domain: name or number, for "B"; the watch data use "left".

    Raises:
        ValueError: the data do not have the subject or the domain, a part of the split is empty, or its normalised values
            are out of range.
    """
    people = np.unique(windows.subject)
    if target not in people:
        raise ValueError(f"subject {target} is not in the data; it has {', '.join(map(str, people))}")
    mine = windows.subject == target
    others = ~mine
    if protocol == "B":
        if target_domain is None:
            raise ValueError(f"protocol B needs the target's domain; give one of {', '.join(windows.domains)}")
        here = windows.domain == windows.domain_index(target_domain)
        mine, others = mine & here, others & ~here
    elif protocol != "A":
        raise ValueError(f'protocol is {protocol!r}; give "A" or "B"')
    start, stop = windows.position.T
    parts = {
        "source": windows.where(others),
        "adapt": windows.where(mine & (stop <= ADAPT_SHARE)),
        "test": windows.where(mine & (start >= 1 - TEST_SHARE)),
    }
    for name, part in parts.items():
        if len(part) == 0:
            raise ValueError(
                f"subject {target}, protocol {protocol}: no {name} windows; the recordings are too short or too few"
            )
    mean = parts["source"].x.mean(axis=(0, 2), dtype=np.float64)
    std = parts["source"].x.std(axis=(0, 2), dtype=np.float64)
    std[std == 0] = 1.0
    normalised = {name: _normalise(part, mean, std) for name, part in parts.items()}
    for name, part in normalised.items():  # a channel that is nearly constant in the source can normalise to huge values
        _check_values(part.x, part.channels, f"subject {target}, {name} windows", " after division by the source's deviation")
    return Split(**normalised, mean=mean, std=std, protocol=protocol, target=target)


def _normalise(part: Windows, mean: np.ndarray, std: np.ndarray) -> Windows:
    with np.errstate(over="ignore"):  # _check_values reports it
        return replace(part, x=((part.x - mean[:, None]) / std[:, None]).astype(np.float32))


def _names(data: dict[str, np.ndarray], key: str, count: int, path: str | os.PathLike[str]) -> list[str]:
    if key not in data:
        return [str(k) for k in range(count)]
    names = data[key]
    if names.ndim != 1 or names.dtype.kind not in "USiu":
        raise ValueError(f"{path}: {key} is {names.dtype} {names.shape}; give an array (names,) of str, one name for each")
    return [name.decode(errors="replace") if isinstance(name, bytes) else str(name) for name in names.tolist()]


def _positions(columns: dict[str, np.ndarray], given: set[str]) -> np.ndarray:
    """Return the share of its recording that each window covers, ``(N, 2)``, from the order of the windows alone.

    The k-th of n windows, or every window of the k-th of n sessions, counts as ``[k / n, (k + 1) / n)``. If a recording has an
    adapting window, its unused 20 % is at least one window wide, so windows with half overlap share no sample across the gap.
    """
    keys = ["subject", "domain", *(["recording"] if "recording" in given else [] if "session" in given else ["y"])]
    _, group = np.unique(np.stack([columns[key] for key in keys]), axis=1, return_inverse=True)
    position = np.empty((len(group), 2))
    for g in np.unique(group):
        index = np.flatnonzero(group == g)
        k = np.arange(len(index))
        if "session" in given:
            _, first, k = np.unique(columns["session"][index], return_index=True, return_inverse=True)
            k = np.argsort(np.argsort(first))[k]  # in order of first appearance
        count = k.max() + 1
        position[index] = np.stack([k / count, (k + 1) / count], axis=1)
    return position
