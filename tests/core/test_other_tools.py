"""Other tools on an adapted model: each works or raises an error that says to merge first; none silently uses the base."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.utils as U
from torch import Tensor, nn
from torch.nn.utils import fusion, parametrizations, parametrize, prune

import lora_edge
from lora_edge.surgery.protect import ProtectedModules

X = torch.randn(4, 3, 12, generator=torch.Generator().manual_seed(0))


class Branches(nn.Module):
    """Two parallel convolutions that can be fused into one, as in RepVGG and MobileOne."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.narrow, self.one = nn.Conv1d(3, 4, 3, padding=1), nn.Conv1d(3, 4, 1), None

    def forward(self, x: Tensor) -> Tensor:
        return self.wide(x) + self.narrow(x) if self.one is None else self.one(x)

    def reparameterize(self) -> None:
        one = nn.Conv1d(3, 4, 3, padding=1)
        with torch.no_grad():
            one.weight.copy_(self.wide.weight + nn.functional.pad(self.narrow.weight, (1, 1)))
            one.bias.copy_(self.wide.bias + self.narrow.bias)
        self.one = one
        del self.wide, self.narrow


class ConvBN(nn.Module):
    """A convolution with its BatchNorm, which can be folded into it, as in ultralytics' models."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv1d(4, 4, 3, bias=False), nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x)).relu()

    def fuse(self) -> None:
        scale = self.bn.weight / (self.bn.running_var + self.bn.eps).sqrt()
        folded = nn.Conv1d(4, 4, 3)
        with torch.no_grad():
            folded.weight.copy_(self.conv.weight * scale[:, None, None])
            folded.bias.copy_(self.bn.bias - self.bn.running_mean * scale)
        self.conv = folded
        del self.bn
        self.forward = lambda x: self.conv(x).relu()


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.block = Branches(), nn.Sequential(ConvBN())
        self.last, self.fc = nn.Conv1d(4, 4, 3), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.last(self.block(self.stem(x))).mean(-1))

    def save_pretrained(self, folder: str) -> str:
        return folder


def trained(lean: bool = True) -> Net:
    torch.manual_seed(0)
    model = lora_edge.adapt(Net().eval(), 2, lean=lean)
    for core in lora_edge.trainable_parameters(model):
        nn.init.normal_(core, 0, 0.3)
    return model


def reparameterize(model: Net) -> None:
    for module in list(model.modules()):
        if hasattr(module, "reparameterize"):
            module.reparameterize()


def fuse(model: Net) -> None:
    for module in list(model.modules()):
        if hasattr(module, "fuse"):
            module.fuse()


def exchange(model: nn.Module) -> None:
    """Replace modules recursively, as many conversion scripts do."""
    for name, child in model._modules.items():
        if isinstance(child, nn.Conv1d):
            model._modules[name] = nn.Conv1d(child.in_channels, child.out_channels, child.kernel_size)
        else:
            exchange(child)


def without_norms(model: Net) -> None:
    setattr(model.block[0], "bn", nn.Identity())  # noqa: B010


TOOLS = {
    "re-parameterize": reparameterize, "fold BatchNorm": fuse, "exchange": exchange, "BatchNorm taken out": without_norms,
    "fuse_conv_bn_eval": lambda m: fusion.fuse_conv_bn_eval(m.block[0].conv, m.block[0].bn),
    "new weight": lambda m: setattr(m.last, "weight", nn.Parameter(torch.zeros(4, 4, 3))),
    "del": lambda m: delattr(m, "last"),
    "None": lambda m: setattr(m, "last", None),
    "add_module": lambda m: m.add_module("last", nn.Identity()),
    "pop": lambda m: m.block.pop(0),
    "clear": lambda m: m._modules.clear(),
    "update": lambda m: m._modules.update(last=nn.Identity()),
    "save_pretrained": lambda m: m.save_pretrained("folder"),
    "jit.script": torch.jit.script,
}  # fmt: skip


@pytest.mark.parametrize("copied", [False, True], ids=["in place", "copied"])
@pytest.mark.parametrize("lean", [True, False])
@pytest.mark.parametrize("tool", TOOLS)
def test_a_tool_that_would_lose_the_update_says_merge_first(tool, lean, copied):
    model = trained(lean)
    want = model(X).detach()
    if copied:
        model = copy.deepcopy(model) if tool != "del" else pickle.loads(pickle.dumps(model))
    with pytest.raises(RuntimeError, match="merge") as refused:
        TOOLS[tool](model)
    assert "\n" not in str(refused.value)
    assert torch.equal(model(X), want)
    lora_edge.merge(model)
    torch.testing.assert_close(model(X), want)


@pytest.mark.parametrize("tool", ["re-parameterize", "fold BatchNorm", "BatchNorm taken out", "save_pretrained"])
def test_after_merge_every_tool_works(tool):
    model = trained()
    want = model(X).detach()
    lora_edge.merge(model)
    TOOLS[tool](model)
    assert not any(isinstance(module._modules, ProtectedModules) for module in model.modules())
    assert "save_pretrained" not in vars(model)
    if tool in ("re-parameterize", "fold BatchNorm"):
        torch.testing.assert_close(model(X), want)


@pytest.mark.parametrize("copied", [False, True], ids=["in place", "copied"])
@pytest.mark.parametrize("lean", [True, False])
def test_convert_sync_batchnorm_keeps_it_frozen(lean, copied, tmp_path):
    model = trained(lean)
    want = model(X).detach()
    statistics = {name: value.clone() for name, value in model.named_buffers()}
    model = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(model) if copied else model).train()
    norms = [m for m in model.modules() if isinstance(m, nn.SyncBatchNorm)]
    assert norms
    assert not any(norm.training for norm in norms)
    torch.testing.assert_close(model(X), want)
    assert all(torch.equal(value, statistics[name]) for name, value in model.named_buffers())
    lora_edge.save_adapter(model, tmp_path / "a.safetensors")
    lora_edge.merge(model)
    assert all(type(norm) is nn.SyncBatchNorm and norm.training for norm in norms)


def test_changes_that_keep_the_adapted_layers_are_allowed():
    model = trained()
    want = model(X).detach()
    model.last = nn.Sequential(model.last, nn.Identity())  # a wrapper
    model.block.append(nn.Identity())
    model.extra = nn.Linear(2, 2)
    del model.extra
    model.last = model.last
    assert torch.equal(model(X), want)
    model.fc = nn.Linear(4, 3)  # a fresh head
    assert model(X).shape == (4, 3)


def test_state_dicts_moves_and_copies_pass_the_guard():
    model, other = trained(), trained()
    for core in lora_edge.trainable_parameters(other):
        nn.init.normal_(core)
    want = other(X).detach()
    model.load_state_dict({name: value.clone() for name, value in other.state_dict().items()}, assign=True)
    assert torch.equal(model(X), want)
    assert torch.equal(copy.deepcopy(model)(X), want)
    torch.testing.assert_close(model.double()(X.double()).float(), want)
    with pytest.raises(RuntimeError, match="merge"):  # assign=True is over
        model.last.weight = nn.Parameter(torch.zeros(4, 4, 3))


@pytest.mark.parametrize("lean", [True, False])
def test_a_parent_that_refers_to_itself_is_copied(lean):
    model = trained(lean)
    model.last.__dict__["parent"] = model
    twin = copy.deepcopy(model)
    assert twin.last.__dict__["parent"] is twin
    assert isinstance(twin._modules, ProtectedModules)
    assert torch.equal(pickle.loads(pickle.dumps(twin))(X), model(X))


COMPUTED = {
    "prune": (lambda c: prune.l1_unstructured(c, "weight", 0.5), lambda c: prune.remove(c, "weight"), "prune.remove"),
    "weight_norm": (U.weight_norm, U.remove_weight_norm, "remove_weight_norm"),
    "spectral_norm": (U.spectral_norm, U.remove_spectral_norm, "remove_spectral_norm"),
    "parametrizations.weight_norm": (
        parametrizations.weight_norm, lambda c: parametrize.remove_parametrizations(c, "weight"), "remove_parametrizations",
    ),
    "parametrizations.spectral_norm": (
        parametrizations.spectral_norm, lambda c: parametrize.remove_parametrizations(c, "weight"), "remove_parametrizations",
    ),
    "a parametrized bias": (
        lambda c: parametrize.register_parametrization(c, "bias", nn.Tanh()),
        lambda c: parametrize.remove_parametrizations(c, "bias"),
        "remove_parametrizations.*bias",
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("kind", COMPUTED)
def test_merge_names_what_computes_a_weight_and_works_after_its_removal(kind):
    compute, remove, remedy = COMPUTED[kind]
    model = trained()
    compute(model.last)
    want, classes = model(X).detach(), [type(m) for m in model.modules()]
    with pytest.raises(RuntimeError, match=rf"last\.(weight|bias) is computed since adapt; call .*{remedy}") as refused:
        lora_edge.merge(model)
    assert "\n" not in str(refused.value)
    assert [type(m) for m in model.modules()] == classes
    torch.testing.assert_close(model(X).detach(), want)
    remove(model.last)
    want = model(X).detach()
    lora_edge.merge(model)
    assert type(model.last) is nn.Conv1d
    assert list(model.last.state_dict()) == ["weight", "bias"]
    torch.testing.assert_close(model(X), want)


@pytest.mark.parametrize("lean", [True, False])
def test_a_trainer_that_wants_every_gradient_does_not_train_the_suffixes(lean):
    model = trained(lean)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if name.endswith("suffix")}
    for parameter in model.parameters():
        parameter.requires_grad = True
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    for _ in range(2):
        model(X).square().sum().backward()
        optimizer.step()
    for name, parameter in model.named_parameters():
        if name in before:
            assert torch.equal(parameter, before[name]), name
    assert model.last.core.grad is not None


def test_layers_built_by_hand_are_guarded_too():
    layer = lora_edge.LoRAEdgeConv1d(3, 4, 3, rank=2)
    for name in ("weight", "core", "suffix"):
        with pytest.raises(RuntimeError, match=f"{name} of an adapted convolution cannot be replaced.*merge"):
            setattr(layer, name, nn.Parameter(torch.zeros_like(getattr(layer, name))))
        setattr(layer, name, getattr(layer, name))
    layer.bias = nn.Parameter(torch.ones(4))
