"""The data sets, the protocols and the splits: counts, no leak, and every bad file refused in one line. About 30 s."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from benchmarks.study import phone_watch
from helpers.windows import own
from lora_edge.har import data
from lora_edge.har.data import ADAPT_SHARE, TEST_SHARE, WATCH_STEP, WATCH_WINDOW, load_npz, load_watch, split
from lora_edge.har.frame import mirrored
from lora_edge.har.models import MobileNetV2, ResNet18, TResNet, mobilenet_v2_on_windows, resnet18_on_windows
from lora_edge.har.training import Curve, batches, macro_f1, predict, tensors, train_source, train_target


def test_watch_windows(watch):
    assert len(watch) == 4_677
    assert watch.x.shape == (4_677, 6, 100)
    assert watch.classes == ["PEN", "ABD", "FEL", "IR", "ER", "TRAP", "ROW"]
    assert watch.channels == ["ax", "ay", "az", "wx", "wy", "wz"]
    assert sorted(set(watch.subject.tolist())) == list(range(1, 11))
    assert watch.domains[1] == "right"


def test_watch_file_is_checked_before_it_is_unpickled(watch, monkeypatch):
    monkeypatch.setattr(data, "WATCH_SHA256", "0" * 64)
    monkeypatch.setattr(np, "load", lambda *_, **__: pytest.fail("unpickled an unchecked file"))
    with pytest.raises(ValueError, match=r"its SHA-256 is eb122f23.*; install seglearn==1\.2\.5"):
        load_watch()


def test_watch_without_seglearn(monkeypatch):
    monkeypatch.setattr(data.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r'run pip install "lora_edge\[har\]"'):
        load_watch()


@pytest.mark.parametrize("protocol", ["A", "B"])
@pytest.mark.parametrize("person", range(1, 11))
def test_protocols(watch, person, protocol):
    task = split(watch, person, protocol, "left" if protocol == "B" else None)
    assert person not in task.source.subject
    assert set(task.adapt.subject) == set(task.test.subject) == {person}
    sides = {watch.domains[d] for d in np.unique(task.source.domain)}, {watch.domains[d] for d in np.unique(task.test.domain)}
    assert sides == (({"left", "right"}, {"left", "right"}) if protocol == "A" else ({"right"}, {"left"}))
    assert (task.adapt.position[:, 1] <= ADAPT_SHARE).all()
    assert (task.test.position[:, 0] >= 1 - TEST_SHARE).all()
    assert set(task.test.y) == set(range(7))
    np.testing.assert_allclose(task.source.x.mean(axis=(0, 2)), 0, atol=1e-4)
    np.testing.assert_allclose(task.source.x.std(axis=(0, 2)), 1, atol=1e-4)
    assert abs(task.test.x.mean(axis=(0, 2))).max() > 0.01, "normalised with source statistics only"


def test_no_sample_is_on_both_sides(watch):
    """By the values: no sensor sample of an adaptation window occurs in a test window."""
    task = split(watch, 1, "B", "left")
    seen = {tuple(sample) for window in task.adapt.x for sample in window.T}
    assert not any(tuple(sample) in seen for window in task.test.x for sample in window.T)


def test_windows_overlap_by_half(watch):
    first, second = watch.x[0], watch.x[1]
    np.testing.assert_array_equal(first[:, WATCH_STEP:], second[:, : WATCH_WINDOW - WATCH_STEP])


def test_mirroring_negates_raw_values(watch):
    task = split(watch, 1, "B", "left")
    both = mirrored(task)
    for k, name in enumerate(watch.channels):
        raw, other = (t.test.x[:, k] * task.std[k] + task.mean[k] for t in (task, both))
        np.testing.assert_allclose(other, -raw if name in ("ax", "wy", "wz") else raw, atol=1e-3)


def test_own_data(tmp_path):
    windows = load_npz(own(tmp_path / "own.npz"))
    assert len(windows) == 240
    assert windows.classes == ["walk", "sit", "run"]
    assert windows.channels == ["0", "1", "2", "3"]
    task = split(windows, 1, "B", "watch")
    assert set(task.source.subject) == {2}
    assert set(task.source.domain) == {0}
    assert (len(task.adapt), len(task.test)) == (3 * 6, 3 * 10)
    assert len(split(windows, 1, "B", 1).test) == 30
    with pytest.raises(ValueError, match="mirroring needs the channels ax, wy, wz"):
        mirrored(task)


def test_own_recordings_are_split_by_time(tmp_path):
    recording = np.repeat(np.arange(8), 30)
    task = split(load_npz(own(tmp_path / "own.npz", recording=recording)), 1)
    assert (len(task.adapt), len(task.test)) == (4 * 9, 4 * 15)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"X": None}, "has no 'X'"),
        ({"subject": None}, "has no 'subject'"),
        ({"X": np.zeros((240, 4))}, "X is float64 .240, 4.; give floats of shape"),
        ({"X": np.zeros((240, 4, 30), int)}, "X is int64"),
        ({"y": np.zeros(3, int)}, r"y is int64 \(3,\); give integers of shape \(240,\)"),
        ({"y": np.zeros(240)}, "y is float64"),
        ({"y": np.full(240, 3)}, "y holds 3; labels run from 0 to 2"),
        ({"y": np.full(240, -1)}, "y holds -1; labels run from 0 to 2"),
        ({"domain": np.full(240, 2)}, "domain holds 2; labels run from 0 to 1"),
        ({"X": np.full((240, 4, 30), np.nan)}, r"window 0 holds NaN or Inf \(240 do\)"),
        ({"X": np.zeros((0, 4, 30)), "y": np.zeros(0, int), "subject": np.zeros(0, int), "domain": None}, "holds no windows"),
        ({"y": np.array([{}] * 240, dtype=object)}, "not a readable .npz"),
    ],
)
def test_bad_own_data(tmp_path, change, text):
    path = own(tmp_path / "own.npz", **change)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=text) as caught:
        load_npz(path)
    assert "\n" not in str(caught.value)
    assert path.read_bytes() == before


def test_unreadable_own_data(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_npz(tmp_path / "none.npz")
    (tmp_path / "text.npz").write_text("hello")
    with pytest.raises(ValueError, match="not a readable"):
        load_npz(tmp_path / "text.npz")
    good = own(tmp_path / "own.npz").read_bytes()
    (tmp_path / "half.npz").write_bytes(good[: len(good) // 2])
    with pytest.raises(ValueError, match=r"half\.npz"):
        load_npz(tmp_path / "half.npz")


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ((7,), "subject 7 is not in the data; it has 1, 2"),
        ((1, "B"), "protocol B needs the target's domain; give one of phone, watch"),
        ((1, "B", "ring"), "domain 'ring' is not in the data; it has phone, watch"),
        ((1, "B", 2), "domain 2 is not in the data"),
        ((1, "C"), "protocol is 'C'"),
    ],
)
def test_bad_split(tmp_path, arguments, text):
    with pytest.raises(ValueError, match=text):
        split(load_npz(own(tmp_path / "own.npz")), *arguments)


def test_a_part_without_windows(tmp_path):
    path = own(tmp_path / "own.npz", recording=np.arange(240))
    with pytest.raises(ValueError, match="no adapt windows"):
        split(load_npz(path), 1)
    with pytest.raises(ValueError, match="no source windows"):
        split(load_npz(own(tmp_path / "one.npz", subject=np.ones(240, int))), 1)


def test_phone_and_watch_data_as_own_data(spsw_path, tmp_path, monkeypatch):
    """The real phone and watch data, where they lie beside the repository, in the documented format."""
    monkeypatch.setattr("sys.argv", ["phone_watch", str(spsw_path), str(tmp_path / "spsw.npz")])
    assert phone_watch.main() == 0
    windows = load_npz(tmp_path / "spsw.npz")
    assert len(windows) == 8_359
    task = split(windows, 1, "B", "watch")
    assert task.source.x.shape[1:] == (6, 50)
    assert len(np.unique(task.test.y)) == 5


def test_sessions_are_not_cut(tmp_path):
    """Ten sessions of unequal length: the first three adapt, the last five test, in any numbering."""
    lengths = np.array([7, 1, 4, 2, 3, 9, 5, 6, 8, 2])
    session = np.repeat([30, 2, 7, 1, 9, 8, 4, 0, 5, 6], lengths)
    count = len(session)
    rest = {"X": np.random.randn(2 * count, 4, 8).astype(np.float32), "y": np.arange(2 * count) % 3}
    path = own(tmp_path / "own.npz", subject=np.repeat([1, 2], count), domain=None, session=np.tile(session, 2), **rest)
    task = split(load_npz(path), 1)
    assert len(task.adapt) == lengths[:3].sum()
    assert len(task.test) == lengths[5:].sum()


def test_models_accept_their_inputs():
    assert TResNet(6, 7).eval()(torch.randn(2, 6, 100)).shape == (2, 7)
    assert MobileNetV2(17).eval()(torch.randn(2, 3, 97, 60)).shape == (2, 17)
    assert ResNet18(10).eval()(torch.randn(2, 3, 32, 32)).shape == (2, 10)
    assert sum(p.numel() for p in TResNet(6, 7).parameters()) == 507_027
    assert sum(p.numel() for p in MobileNetV2(1000).parameters()) == 3_504_872  # torchvision's
    assert {"features.0.0.weight", "features.1.conv.0.0.weight", "features.18.1.bias", "classifier.1.weight"} <= set(
        MobileNetV2(17).state_dict()
    )


@pytest.mark.parametrize("factory", [mobilenet_v2_on_windows, resnet18_on_windows])
def test_image_networks_read_the_axes_of_each_sensor(factory):
    model, x = factory(6, 7).eval(), torch.randn(2, 6, 100)
    accelerometer, gyroscope = x[:, :3], x[:, 3:]
    image = torch.stack([accelerometer, gyroscope], dim=2)
    with torch.no_grad():
        assert torch.equal(model(x), model.network(image))
    assert model(x).shape == (2, 7)
    with pytest.raises(ValueError, match="got 4 channels; give a multiple of 3"):
        factory(4, 7)


def test_batches_are_full_and_repeatable():
    first, second = (batches(10, 4, torch.Generator().manual_seed(1)) for _ in range(2))
    for _ in range(5):
        a, b = next(first), next(second)
        assert len(a) == 4
        assert torch.equal(a, b)
    assert len(next(batches(3, 64, torch.Generator()))) == 3


def test_the_curve_of_a_training():
    curve = Curve([0, 5, 10], [0.0, 1.5, 3.0], [0.1, 0.8, 0.9])
    assert curve.seconds_to(0.8) == 1.5
    assert curve.seconds_to(0.95) is None


def test_training_learns_and_evaluation_keeps_the_flags(tmp_path):
    task = split(load_npz(own(tmp_path / "own.npz")), 1)
    model = torch.nn.Sequential(torch.nn.AdaptiveAvgPool1d(1), torch.nn.Flatten(), torch.nn.Linear(4, 3))
    train_source(model, task.source, epochs=60, lr=0.1)
    model.train()
    assert macro_f1(model, task.test) > 0.9
    assert model.training
    curve = train_target(
        model, list(model.parameters()), task.adapt, task.test, steps=2, lr=0.1, evaluate_every=1, setup_seconds=5
    )
    assert curve.step == [0, 1, 2]
    assert 5 == curve.seconds[0] < curve.seconds[1] < curve.seconds[2] < 6


@pytest.mark.slow
def test_lean_on_and_off_adapt_a_real_person_alike(watch):
    """Fifty steps on real windows with one seed and frozen BatchNorm; rounding may change one window's class at most."""
    import copy

    import lora_edge

    task = split(watch, 1, "B", "left")
    torch.manual_seed(0)
    base = train_source(TResNet(6, 7), task.source, epochs=1)
    classes = []
    for lean in (True, False):
        model = lora_edge.adapt(copy.deepcopy(base), 2, lean=lean)
        parameters = list(lora_edge.trainable_parameters(model))
        train_target(model, parameters, task.adapt, task.test, steps=50, lr=1e-2, evaluate_every=50)
        classes.append(predict(model, tensors(task.test)[0]))
    assert int((classes[0] != classes[1]).sum()) <= 1
