"""``bn="frozen"`` works for the stock BatchNorms and for subclasses of them; what cannot be frozen is refused."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lora_edge
from lora_edge.memory import saved_bytes
from lora_edge.nn.frozen_bn import FrozenBatchNorm, FrozenNorm, FrozenSubclass, FrozenThen, frozen_class

X = torch.randn(6, 3, 9, 8, generator=torch.Generator().manual_seed(0)) + 2


class NormAct(nn.BatchNorm2d):
    """BatchNorm, dropout and activation in one layer with a forward of its own, as timm has it."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.drop, self.act = nn.Dropout(0.5), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        momentum = self.momentum
        if self.training and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            momentum = 1.0 / float(self.num_batches_tracked) if momentum is None else momentum
        y = F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, self.training, momentum or 0, self.eps)
        return self.act(self.drop(y))


class Renorm(nn.BatchNorm2d):
    """Batch renormalization: corrects the batch's statistics by the running ones, and counts its steps."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        mean, deviation = x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False).add(self.eps).sqrt()
        running = self.running_var.add(self.eps).sqrt()
        r, d = (deviation / running).detach(), ((mean - self.running_mean) / running).detach()
        with torch.no_grad():
            self.steps += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(deviation**2, self.momentum)
        y = (x - mean[:, None, None]) / deviation[:, None, None] * r[:, None, None] + d[:, None, None]
        return y * self.weight[:, None, None] + self.bias[:, None, None]


class Ghost(nn.BatchNorm2d):
    """Ghost BatchNorm: normalises each part of the batch by its own statistics."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        return torch.cat([super(Ghost, self).forward(part) for part in x.chunk(2)])


class Split(nn.BatchNorm2d):
    """A second BatchNorm inside for the second half of the batch."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.second = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        first, second = x.chunk(2)
        return torch.cat([super().forward(first), self.second(second)])


class Replacing(nn.BatchNorm2d):
    """Replaces its statistics by new tensors, which no version counter shows."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.running_mean = self.running_mean + 0.1 * (x.detach().mean((0, 2, 3)) - self.running_mean)
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)


class Tokens(nn.BatchNorm1d):
    """Channels last, with a train method that does not return the module."""

    def train(self, mode: bool = True) -> None:  # type: ignore[override]
        super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flatten(0, -2)).reshape(x.shape)


class Always(nn.BatchNorm2d):
    """Moves its statistics in evaluation mode too."""

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, True, 0.1, self.eps)


class Counting(nn.BatchNorm2d):
    """Counts its forwards in a buffer that is part of its state."""

    def forward(self, x: Tensor) -> Tensor:
        self.num_batches_tracked += 1
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)


class OfTheBatch(nn.BatchNorm2d):
    """Never uses its running statistics."""

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, None, None, self.weight, self.bias, True, 0.1, self.eps)


class Conditional(nn.BatchNorm2d):
    """Needs more than one tensor, so it cannot be tried."""

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x) * labels[:, None, None, None]


class Net(nn.Module):
    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 4, 3), norm, nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return self.head(self.norm(x.movedim(1, -1)).movedim(-1, 1) if isinstance(self.norm, Tokens) else self.norm(x))


SUBCLASSES = [NormAct, Renorm, Ghost, Split, Replacing, Tokens]
REFUSED = [
    (Always, "running_mean in evaluation"),
    (Counting, "num_batches_tracked in evaluation"),
    (OfTheBatch, "each sample independently"),
    (Conditional, "could not be tried"),
]


def net(kind: type[nn.Module]) -> Net:
    torch.manual_seed(0)
    model = Net(kind(4)).train()
    with torch.no_grad():
        if kind is not Conditional:
            model(X)  # statistics that are not the initial ones
        for p in model.norm.parameters():
            p.uniform_(0.5, 1.5)
    return model


def state(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("lean", [True, False])
@pytest.mark.parametrize("kind", SUBCLASSES)
def test_a_subclass_is_frozen_through_train(kind, lean):
    model = net(kind)
    want, before = copy.deepcopy(model).eval()(X), state(model.norm)
    lora_edge.adapt(model, 2, lean=lean)
    assert same(state(model.norm), before)
    model.train()
    assert isinstance(model.norm, kind)
    assert isinstance(model.norm, FrozenNorm)
    assert not model.norm.training
    assert all(module.training for module in model.norm.children() if not isinstance(module, nn.BatchNorm2d))
    for module in model.norm.modules():
        if isinstance(module, nn.Dropout):
            module.eval()  # so that there is a value to compare with
    for _ in range(2):
        y = model(X)
        torch.testing.assert_close(y, want, rtol=1e-5, atol=1e-5)
        y.square().mean().backward()
    assert model.conv.core.grad is not None
    assert same(state(model.norm), before)


@pytest.mark.parametrize("kind", SUBCLASSES)
def test_merge_restores_class_and_flags(kind):
    model = net(kind)
    if kind is NormAct:
        model.norm.drop.eval()
    flags, classes = [m.training for m in model.modules()], [type(m) for m in model.modules()]
    attributes = vars(model.norm).keys()
    lora_edge.merge(lora_edge.adapt(model, 2))
    assert [m.training for m in model.modules()] == flags
    assert [type(m) for m in model.modules()] == classes
    assert vars(model.norm).keys() == attributes
    assert lora_edge.merge(lora_edge.adapt(model, 2).eval()).norm.training is False


@pytest.mark.parametrize("kind", SUBCLASSES)
def test_copies_pickles_and_state_dicts(kind):
    model = lora_edge.adapt(net(kind), 2).eval()
    want = model(X)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), pickle.loads(pickle.dumps(model, protocol=1))):
        assert type(twin.norm) is type(model.norm)
        assert torch.equal(twin(X), want)
        assert not twin.train().norm.training
        lora_edge.merge(twin)
        assert type(twin.norm) is kind
    fresh = lora_edge.adapt(net(kind), 2)
    fresh.load_state_dict(model.state_dict())
    assert same(state(fresh), state(model))


@pytest.mark.parametrize(("kind", "why"), REFUSED)
def test_what_evaluation_mode_does_not_freeze_is_refused_unless_excluded(kind, why):
    model = net(kind)
    before, classes = state(model), [type(m) for m in model.modules()]
    with pytest.raises(ValueError, match=f"norm: .*{kind.__name__}.*{why}.*exclude") as refused:
        lora_edge.adapt(model, 2)
    assert "\n" not in str(refused.value)
    assert same(state(model), before)
    assert [type(m) for m in model.modules()] == classes
    lora_edge.adapt(model, 2, exclude="norm")
    assert type(model.norm) is kind
    assert why in lora_edge.summary(model).left_alone["norm"]
    assert isinstance(model.conv, lora_edge.LoRAEdgeConv2d)


def test_with_batch_statistics_nothing_is_refused():
    assert type(lora_edge.adapt(net(Always), 2, bn="batch").norm) is Always


def test_an_instance_with_its_own_forward_is_tried_too():
    model = net(nn.BatchNorm2d)
    norm = model.norm
    norm.forward = lambda x: F.batch_norm(x, norm.running_mean, norm.running_var, training=True)
    before = state(norm)
    with pytest.raises(ValueError, match="norm: the forward of BatchNorm2d changes running_mean"):
        lora_edge.adapt(model, 2)
    assert same(state(norm), before)  # the closure writes to the module itself, not to the copy that is tried
    norm.forward = lambda x: 2 * F.batch_norm(x, norm.running_mean, norm.running_var)
    want = model.eval()(X)
    lora_edge.adapt(model, 2).train()
    torch.testing.assert_close(model(X), want, rtol=1e-5, atol=1e-5)


def test_torch_generator_and_hooks_are_left_alone_by_the_trial():
    model, calls = net(NormAct), []
    model.norm.register_forward_hook(lambda *_: calls.append(1))
    random = torch.get_rng_state()
    lora_edge.adapt(model, 2, lean=False)
    assert calls == []
    assert torch.equal(torch.get_rng_state(), random)


def test_a_frozen_batchnorm_that_has_only_buffers_is_left_as_it_is():
    class Buffers(nn.Module):  # as torchvision.ops.FrozenBatchNorm2d
        def __init__(self, channels: int) -> None:
            super().__init__()
            for name, value in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.5), ("running_var", 2.0)):
                self.register_buffer(name, torch.full((channels,), value))

        def forward(self, x: Tensor) -> Tensor:
            scale = (self.weight * (self.running_var + 1e-5).rsqrt())[:, None, None]
            return x * scale + (self.bias[:, None, None] - self.running_mean[:, None, None] * scale)

    model = lora_edge.adapt(net(Buffers), 2).train()
    assert type(model.norm) is Buffers
    assert "norm" not in lora_edge.summary(model).left_alone


def test_plain_arithmetic_is_told_from_own_forwards():
    assert issubclass(frozen_class(nn.BatchNorm2d), FrozenBatchNorm)
    for kind in SUBCLASSES:
        frozen = frozen_class(kind)
        assert frozen is frozen_class(kind)
        assert issubclass(frozen, FrozenSubclass)
        assert not issubclass(frozen, FrozenBatchNorm)


def test_a_forward_that_is_known_saves_nothing_for_its_batchnorm(monkeypatch):
    monkeypatch.setitem(lora_edge.nn.frozen_bn._THEN, f"{__name__}.Known", ("drop", "act"))
    Known = type("Known", (NormAct,), {"__module__": __name__, "__qualname__": "Known"})  # noqa: N806
    known, other = (lora_edge.adapt(net(kind), 2).eval() for kind in (Known, NormAct))
    assert isinstance(known.norm, FrozenThen)
    torch.testing.assert_close(known(X), other(X))
    x = torch.randn(2, 4, 5, 5, requires_grad=True)
    assert saved_bytes(other.norm, x) - saved_bytes(known.norm, x) >= x.nbytes
    gradients = [torch.autograd.grad(m.norm(x * 1.0).square().sum(), x)[0] for m in (known, other)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("shape", [(3, 4), (3, 4, 7), (3, 4, 1)], ids=str)
def test_the_output_is_no_view_so_that_the_next_layer_may_write_in_place(shape):
    frozen = nn.Sequential(nn.BatchNorm1d(4))
    lora_edge.nn.frozen_bn.freeze_bn(frozen[0], lean=True)
    x = torch.randn(shape, requires_grad=True)
    inputs = [x * 1.0]
    if len(shape) == 3:
        inputs.append((x * 1.0).unsqueeze(2).contiguous(memory_format=torch.channels_last).squeeze(2))
    for value in inputs:
        want = F.batch_norm(value, frozen[0].running_mean, frozen[0].running_var, frozen[0].weight, frozen[0].bias)
        y = frozen(value)
        assert not y._is_view()
        assert torch.equal(y, want)
        assert torch.equal(y.mul_(2).relu_(), want.mul(2).relu())


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_update_bn_changes_nothing_and_says_so(dims):
    conv, bn = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1], (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[dims - 1]
    model = nn.Sequential(conv(3, 4, 3), bn(4), conv(4, 4, 3), bn(4))
    x = 3 * torch.randn(4, 3, *[8] * dims)
    model.train()(x)
    lora_edge.adapt(model, 2)
    before = {name: value.clone() for name, value in model.named_buffers()}
    with pytest.warns(UserWarning, match=r"call lora_edge.calibrate_bn\(model, batches\)"):
        torch.optim.swa_utils.update_bn([x], model)
    assert all(torch.equal(value, before[name]) for name, value in model.named_buffers())
    lora_edge.calibrate_bn(model, [x])
    assert not torch.equal(model[1].running_mean, before["1.running_mean"])
