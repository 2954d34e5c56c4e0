"""save_adapter and load_adapter: exact round trips, small files, and every kind of damage refused by name."""

from __future__ import annotations

import copy
import os
import stat

import pytest
import torch
from safetensors.torch import save_file

import lora_edge
from helpers.networks import BUILD, network, output, train
from helpers.snapshots import assert_same, snapshot
from lora_edge.adapter_format import read_adapter
from lora_edge.har.models import TResNet


def adapted(name="1-D", rank=2, **options):
    """A trained adapted model, its base and an input."""
    model, x = network(name)
    base = copy.deepcopy(model)
    lora_edge.adapt(model, rank, **options)
    train(model, x, list(lora_edge.trainable_parameters(model)))
    return model.eval(), base, x


@pytest.mark.parametrize("options", [{}, {"bn": "batch"}, {"train_head": True}, {"scaling": "paper", "rank": 5}], ids=str)
@pytest.mark.parametrize("name", list(BUILD))
def test_round_trip_is_exact(tmp_path, name, options):
    model, base, x = adapted(name, **options)
    path = tmp_path / "a.safetensors"
    lora_edge.save_adapter(model, path)
    y = output(model, x)
    into_plain = lora_edge.load_adapter(copy.deepcopy(base), path)
    assert torch.equal(output(into_plain.eval(), x), y)
    into_adapted = lora_edge.load_adapter(lora_edge.adapt(copy.deepcopy(base), **{"rank": 2, **options}), path)
    assert torch.equal(output(into_adapted.eval(), x), y)
    with lora_edge.disabled(into_plain):
        assert torch.equal(output(into_plain, x), output(base, x))
    lora_edge.save_adapter(into_plain, tmp_path / "b.safetensors")
    first, second = read_adapter(path), read_adapter(tmp_path / "b.safetensors")
    assert first.tensors.keys() == second.tensors.keys()
    assert all(torch.equal(value, second.tensors[key]) for key, value in first.tensors.items())
    torch.testing.assert_close(lora_edge.merge(into_plain)(x), y, rtol=1e-5, atol=1e-5)


def test_calibrated_statistics_are_saved(tmp_path):
    base, x = network("1-D")
    model = copy.deepcopy(base)
    lora_edge.calibrate_bn(model, [torch.randn(32, 6, 50) * 2 + 1])
    lora_edge.adapt(model, 2)
    lora_edge.save_adapter(model, tmp_path / "a")
    loaded = lora_edge.load_adapter(copy.deepcopy(base), tmp_path / "a")
    assert torch.equal(output(loaded, x), output(model, x))
    moved, travelled = dict(model.named_buffers()), dict(loaded.named_buffers())
    assert all(torch.equal(value, travelled[name]) for name, value in moved.items())
    assert not torch.equal(output(loaded, x), output(base, x))
    with lora_edge.disabled(loaded):
        assert torch.equal(output(loaded, x), output(base, x))


def test_a_suffix_that_is_not_given_as_cores_is_saved(tmp_path):
    model, base, x = adapted()
    with torch.no_grad():
        model[0].suffix.mul_(1.5)
    lora_edge.save_adapter(model, tmp_path / "a")
    assert "0.suffix" in read_adapter(tmp_path / "a").tensors
    assert torch.equal(output(lora_edge.load_adapter(base, tmp_path / "a").eval(), x), output(model, x))


def test_size_for_t_resnet(tmp_path):
    lora_edge.save_adapter(lora_edge.adapt(TResNet(97, 17), 2), tmp_path / "a")
    assert (tmp_path / "a").stat().st_size < 40_000
    calibrated = lora_edge.calibrate_bn(TResNet(97, 17), [torch.randn(8, 97, 60)])
    lora_edge.save_adapter(lora_edge.adapt(calibrated, 2), tmp_path / "a")
    assert (tmp_path / "a").stat().st_size < 43_000  # the statistics of 1,569 channels are 12.6 KB
    on_the_wrist = lora_edge.calibrate_bn(TResNet(6, 7), [torch.randn(8, 6, 60)])
    lora_edge.save_adapter(lora_edge.adapt(on_the_wrist, 2), tmp_path / "a")
    assert (tmp_path / "a").stat().st_size < 40_000


def test_old_file_stays_until_the_new_one_is_whole(tmp_path, monkeypatch):
    model, _, _ = adapted()
    path = tmp_path / "a.safetensors"
    lora_edge.save_adapter(model, path)
    before = path.read_bytes()

    def interrupted(tensors, name, metadata):
        with open(name, "wb") as file:
            file.write(b"half of it")
        raise KeyboardInterrupt

    monkeypatch.setattr("lora_edge.files.safetensors_file.save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        lora_edge.save_adapter(model, path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["a.safetensors"]


def test_file_mode_follows_the_umask(tmp_path):
    model, _, _ = adapted()
    lora_edge.save_adapter(model, tmp_path / "a")
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o666 & ~umask


def refused(model, path, error=ValueError):
    before = snapshot(model)
    with pytest.raises(error) as caught:
        lora_edge.load_adapter(model, path)
    assert_same(before, snapshot(model))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_another_base_shape_rank_or_layers_are_refused(tmp_path):
    model, base, _ = adapted()
    path = tmp_path / "a"
    lora_edge.save_adapter(model, path)
    other, _ = network("1-D", seed=1)
    assert "belongs to another base (fingerprint" in refused(other, path)
    assert "has rank 2 in the file and 4 in the model" in refused(lora_edge.adapt(copy.deepcopy(base), 4), path)
    assert "3 is adapted in the file but not in the model" in refused(
        lora_edge.adapt(copy.deepcopy(base), 2, targets="0"), path
    )
    wider = copy.deepcopy(base)
    wider[0] = torch.nn.Conv1d(6, 17, 8)
    assert "0 was adapted at weight (16, 6, 8), in this model it is (17, 6, 8)" in refused(wider, path)
    assert "the model has no convolution '0'" in refused(network("2-D")[0], path)


def test_other_files_are_not_adapters(tmp_path):
    _, base, _ = adapted()
    refused(base, tmp_path / "missing", FileNotFoundError)
    refused(base, tmp_path, FileNotFoundError)
    (tmp_path / "text").write_text("hello")
    assert "not a safetensors file" in refused(base, tmp_path / "text")
    (tmp_path / "empty").write_bytes(b"")
    assert "not a safetensors file" in refused(base, tmp_path / "empty")
    save_file({"w": torch.zeros(3)}, tmp_path / "other")
    assert "not a lora_edge adapter" in refused(base, tmp_path / "other")
    torch.save({}, tmp_path / "pickle")
    assert "not a safetensors file" in refused(base, tmp_path / "pickle")


def tiny(tmp_path):
    """The smallest adapter: one layer, so that every bit can be flipped."""
    torch.manual_seed(0)
    base = torch.nn.Conv1d(1, 2, 1, bias=False)
    path = tmp_path / "a"
    model = lora_edge.adapt(copy.deepcopy(base), 1)
    with torch.no_grad():
        model.core.normal_()
    lora_edge.save_adapter(model, path)
    return base, path


def test_every_flipped_bit_is_refused(tmp_path):
    base, path = tiny(tmp_path)
    good = path.read_bytes()
    lora_edge.load_adapter(copy.deepcopy(base), path)
    bad = tmp_path / "bad"
    before = snapshot(base)
    for bit in range(8 * len(good)):
        raw = bytearray(good)
        raw[bit // 8] ^= 1 << bit % 8
        bad.write_bytes(raw)
        with pytest.raises(ValueError, match=r"^\S+: ") as caught:
            lora_edge.load_adapter(base, bad)
        assert "\n" not in str(caught.value), bit
    assert_same(before, snapshot(base))


def test_every_truncation_is_refused(tmp_path):
    base, path = tiny(tmp_path)
    good = path.read_bytes()
    for length in range(len(good)):
        path.write_bytes(good[:length])
        refused(base, path)
    path.write_bytes(good + b"\0")
    refused(base, path)


def test_paths_that_cannot_be_written(tmp_path):
    model, _, _ = adapted()
    with pytest.raises(OSError, match="cannot write there"):
        lora_edge.save_adapter(model, tmp_path / "no" / "such" / "folder")
    with pytest.raises(OSError, match="directory"):
        lora_edge.save_adapter(model, tmp_path)
    assert os.listdir(tmp_path) == []


def test_saving_a_model_that_is_not_adapted_or_has_no_base_is_refused(tmp_path):
    model, base, _ = adapted()
    with pytest.raises(RuntimeError, match="the model is not adapted"):
        lora_edge.save_adapter(base, tmp_path / "a")
    with torch.no_grad():
        model[6].weight.add_(1.0)
    with pytest.raises(RuntimeError, match="the frozen part of the model changed since adapt"):
        lora_edge.save_adapter(model, tmp_path / "a")
    assert os.listdir(tmp_path) == []


def test_an_adapter_belongs_to_the_base_that_was_loaded_after_adapt(tmp_path):
    model, _ = network("1-D")
    other, x = network("1-D", seed=1)
    lora_edge.adapt(model, 2).load_state_dict(other.state_dict())
    train(model, x, list(lora_edge.trainable_parameters(model)))
    lora_edge.save_adapter(model, tmp_path / "a")
    assert torch.equal(output(lora_edge.load_adapter(other, tmp_path / "a").eval(), x), output(model.eval(), x))
