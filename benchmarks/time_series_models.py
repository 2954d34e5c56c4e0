"""Networks of the time-series field, written from their papers: the 1-D definitions of :mod:`benchmarks.models`.

All accept windows ``(N, channels, length)`` and return logits ``(N, classes)`` unless stated otherwise. They keep what makes
each of them different for an adapter: what stands between the convolutions, how branches meet, which layers are used twice, and
how their forwards are written.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from lora_edge.har.models import TResNet, mobilenet_v2_on_windows, resnet18_on_windows

from .time_series_biosignals import BIOSIGNALS
from .time_series_hybrids import HYBRIDS

CHANNELS, LENGTH, CLASSES = 6, 64, 5


class FCN(nn.Module):
    """Wang, Yan, Oates, IJCNN 2017: three blocks of convolution, BatchNorm, ReLU and a global mean."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        sizes = [(channels, 128, 8), (128, 256, 5), (256, 128, 3)]
        self.blocks = nn.Sequential(*[
            nn.Sequential(nn.Conv1d(i, o, k, padding="same"), nn.BatchNorm1d(o), nn.ReLU()) for i, o, k in sizes
        ])  # fmt: skip
        self.head = nn.Linear(128, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(x).mean(-1))


class WangBlock(nn.Module):
    def __init__(self, inputs: int, maps: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv1d(inputs, maps, 7, padding=3), nn.BatchNorm1d(maps)
        self.conv2, self.bn2 = nn.Conv1d(maps, maps, 5, padding=2), nn.BatchNorm1d(maps)
        self.conv3, self.bn3 = nn.Conv1d(maps, maps, 3, padding=1), nn.BatchNorm1d(maps)
        self.shortcut = nn.Conv1d(inputs, maps, 1) if inputs != maps else None
        self.bn = nn.BatchNorm1d(maps)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        if self.shortcut is not None:
            x = self.shortcut(x)
        return F.relu(y + self.bn(x))


class ResNet1D(nn.Module):
    """Wang, Yan, Oates, IJCNN 2017: the residual network with its functional ReLUs."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.block1, self.block2, self.block3 = WangBlock(channels, 64), WangBlock(64, 128), WangBlock(128, 128)
        self.head = nn.Linear(128, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.mean(self.block3(self.block2(self.block1(x))), dim=2))


class InceptionModule(nn.Module):
    def __init__(self, inputs: int, maps: int) -> None:
        super().__init__()
        self.bottleneck = nn.Conv1d(inputs, maps, 1, bias=False) if inputs > 1 else nn.Identity()
        self.convs = nn.ModuleList([nn.Conv1d(maps, maps, k, padding=k // 2, bias=False) for k in (39, 19, 9)])
        self.pool = nn.MaxPool1d(3, 1, padding=1)
        self.pooled = nn.Conv1d(inputs, maps, 1, bias=False)
        self.bn = nn.BatchNorm1d(4 * maps)

    def forward(self, x: Tensor) -> Tensor:
        narrow = self.bottleneck(x)
        return F.relu(self.bn(torch.cat([*(conv(narrow) for conv in self.convs), self.pooled(self.pool(x))], dim=1)))


class InceptionTime(nn.Module):
    """Fawaz et al., DMKD 2020: six inception modules, a shortcut around every three."""

    def __init__(self, channels: int, classes: int, maps: int = 16, depth: int = 6) -> None:
        super().__init__()
        self.inceptions = nn.ModuleList([InceptionModule(channels if k == 0 else 4 * maps, maps) for k in range(depth)])
        self.shortcuts = nn.ModuleList([
            nn.Sequential(nn.Conv1d(channels if k == 0 else 4 * maps, 4 * maps, 1, bias=False), nn.BatchNorm1d(4 * maps))
            for k in range(depth // 3)
        ])  # fmt: skip
        self.act = nn.ReLU(inplace=True)
        self.head = nn.Linear(4 * maps, classes)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x
        for k, inception in enumerate(self.inceptions):
            x = inception(x)
            if k % 3 == 2:
                x = shortcut = self.act(x + self.shortcuts[k // 3](shortcut))
        return self.head(F.adaptive_avg_pool1d(x, 1).squeeze(-1))


class SeparableConv(nn.Sequential):
    def __init__(self, inputs: int, maps: int, kernel: int) -> None:
        super().__init__(
            nn.Conv1d(inputs, inputs, kernel, padding=kernel // 2, groups=inputs, bias=False),
            nn.Conv1d(inputs, maps, 1, bias=False),
        )


class XceptionModule(nn.Module):
    def __init__(self, inputs: int, maps: int) -> None:
        super().__init__()
        self.bottleneck = nn.Conv1d(inputs, maps, 1, bias=False)
        self.branches = nn.ModuleList([SeparableConv(maps, maps, k) for k in (39, 19, 9)])
        self.pool = nn.Sequential(nn.MaxPool1d(3, 1, padding=1), nn.Conv1d(inputs, maps, 1, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        narrow = self.bottleneck(x)
        return torch.cat([branch(narrow) for branch in self.branches] + [self.pool(x)], dim=1)


class XceptionTime(nn.Module):
    """Rahimian et al., 2019: separable inception modules with residuals, adaptive pooling, pointwise head."""

    def __init__(self, channels: int, classes: int, maps: int = 12) -> None:
        super().__init__()
        sizes = [(channels, maps), (4 * maps, 2 * maps)]
        self.body = nn.ModuleList([XceptionModule(i, m) for i, m in sizes])
        self.shortcuts = nn.ModuleList([nn.Sequential(nn.Conv1d(i, 4 * m, 1), nn.BatchNorm1d(4 * m)) for i, m in sizes])
        wide = 8 * maps
        self.head = nn.Sequential(
            nn.AdaptiveAvgPool1d(20),
            nn.Conv1d(wide, wide // 2, 1), nn.BatchNorm1d(wide // 2), nn.ReLU(),
            nn.Conv1d(wide // 2, classes, 1), nn.BatchNorm1d(classes), nn.ReLU(), nn.AdaptiveAvgPool1d(1),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        for module, shortcut in zip(self.body, self.shortcuts, strict=True):
            x = F.relu(torch.add(module(x), shortcut(x)))
        return self.head(x).squeeze(2)


class Chomp(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        return x[:, :, : -self.size].contiguous()


class TCNBlock(nn.Module):
    def __init__(self, inputs: int, maps: int, dilation: int, norm: Callable[[nn.Module], nn.Module]) -> None:
        super().__init__()
        pad = 2 * dilation
        self.net = nn.Sequential(
            norm(nn.Conv1d(inputs, maps, 3, padding=pad, dilation=dilation)), Chomp(pad), nn.ReLU(), nn.Dropout(0.2),
            norm(nn.Conv1d(maps, maps, 3, padding=pad, dilation=dilation)), Chomp(pad), nn.ReLU(), nn.Dropout(0.2),
        )  # fmt: skip
        self.downsample = nn.Conv1d(inputs, maps, 1) if inputs != maps else None
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        out = self.net(x)
        res = x if self.downsample is None else self.downsample(x)
        return self.relu(out + res)


class TCN(nn.Module):
    """Bai, Kolter, Koltun, 2018: dilated causal convolutions, weight-normed as published or plain."""

    def __init__(self, channels: int, classes: int, norm: Callable[[nn.Module], nn.Module] = lambda conv: conv) -> None:
        super().__init__()
        sizes = [channels, 25, 25, 32, 32]
        blocks = [TCNBlock(i, o, 2**k, norm) for k, (i, o) in enumerate(pairwise(sizes))]
        self.network = nn.Sequential(*blocks)
        self.linear = nn.Linear(32, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.network(x)[:, :, -1])


class OmniScaleLayer(nn.Module):
    def __init__(self, inputs: int, maps: int, primes: tuple[int, ...]) -> None:
        super().__init__()
        self.branches = nn.ModuleList([
            nn.Sequential(nn.ConstantPad1d(((k - 1) // 2, k // 2), 0), nn.Conv1d(inputs, maps, k, bias=False)) for k in primes
        ])  # fmt: skip
        self.bn = nn.BatchNorm1d(maps * len(primes))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(torch.cat([branch(x) for branch in self.branches], 1)), inplace=True)


class OmniScaleCNN(nn.Module):
    """Tang et al., ICLR 2022: every layer has kernels of all prime lengths."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        primes = (1, 2, 3, 5, 7, 11, 13)
        self.layers = nn.Sequential(
            OmniScaleLayer(channels, 8, primes),
            OmniScaleLayer(8 * len(primes), 8, primes),
            OmniScaleLayer(8 * len(primes), 28, (1, 2)),
        )
        self.head = nn.Linear(56, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(x).mean(dim=-1))


class MSResNet(nn.Module):
    """Multi-scale 1-D ResNet: three residual paths with kernels of 3, 5 and 7, their features concatenated."""

    class Path(nn.Module):
        def __init__(self, kernel: int) -> None:
            super().__init__()
            self.conv1, self.bn1 = nn.Conv1d(32, 64, kernel, 2, kernel // 2, bias=False), nn.BatchNorm1d(64)
            self.conv2, self.bn2 = nn.Conv1d(64, 64, kernel, 1, kernel // 2, bias=False), nn.BatchNorm1d(64)
            self.down = nn.Sequential(nn.Conv1d(32, 64, 1, 2, bias=False), nn.BatchNorm1d(64))
            self.relu, self.pool = nn.ReLU(inplace=True), nn.AvgPool1d(4)

        def forward(self, x: Tensor) -> Tensor:
            out = self.relu(self.bn1(self.conv1(x)))
            out = self.bn2(self.conv2(out))
            out += self.down(x)
            return self.pool(self.relu(out))

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv1d(channels, 32, 7, 2, 3, bias=False), nn.BatchNorm1d(32), nn.ReLU(inplace=True))
        self.pool = nn.MaxPool1d(3, 2, 1)
        self.paths = nn.ModuleList([MSResNet.Path(k) for k in (3, 5, 7)])
        self.head = nn.LazyLinear(classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.stem(x))
        return self.head(torch.cat([path(x) for path in self.paths], dim=1).view(x.size(0), -1))


class GatedTCN(nn.Module):
    """van den Oord et al., 2016 (WaveNet): gated dilated convolutions with skip connections."""

    def __init__(self, channels: int, classes: int, maps: int = 24, depth: int = 5) -> None:
        super().__init__()
        self.first = nn.Conv1d(channels, maps, 1)
        self.dilated = nn.ModuleList([nn.Conv1d(maps, 2 * maps, 2, dilation=2**k) for k in range(depth)])
        self.skips = nn.ModuleList([nn.Conv1d(maps, maps, 1) for _ in range(depth)])
        self.mixes = nn.ModuleList([nn.Conv1d(maps, maps, 1) for _ in range(depth)])
        self.last = nn.Sequential(nn.ReLU(), nn.Conv1d(maps, maps, 1), nn.ReLU(), nn.Conv1d(maps, classes, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        total = 0
        for k, (dilated, skip, mix) in enumerate(zip(self.dilated, self.skips, self.mixes, strict=True)):
            value, gate = dilated(F.pad(x, (2**k, 0))).chunk(2, dim=1)
            y = torch.tanh(value) * torch.sigmoid(gate)
            total = total + skip(y)
            x = x + mix(y)
        return self.last(total).mean(-1)


class Encoder(nn.Module):
    """Serrà et al., 2018: InstanceNorm, PReLU and attention by half of the channels."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()

        def block(inputs: int, maps: int, kernel: int) -> nn.Sequential:
            return nn.Sequential(
                nn.Conv1d(inputs, maps, kernel, padding="same"),
                nn.InstanceNorm1d(maps, affine=True),
                nn.PReLU(maps),
                nn.Dropout(0.2),
            )

        self.conv1, self.conv2, self.conv3 = block(channels, 32, 5), block(32, 64, 11), block(64, 128, 21)
        self.pool, self.head = nn.MaxPool1d(2), nn.Linear(64, classes)

    def forward(self, x: Tensor) -> Tensor:
        data, attention = self.conv3(self.pool(self.conv2(self.pool(self.conv1(x))))).split(64, dim=1)
        return self.head((data * torch.softmax(attention, dim=-1)).sum(-1))


class DenseLayer(nn.Module):
    def __init__(self, inputs: int, growth: int) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm1d(inputs), nn.Conv1d(inputs, 2 * growth, 1, bias=False)
        self.bn2, self.conv2 = nn.BatchNorm1d(2 * growth), nn.Conv1d(2 * growth, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.conv2(F.relu(self.bn2(self.conv1(F.relu(self.bn1(x))))))], dim=1)


class DenseNet1D(nn.Sequential):
    """Huang et al., CVPR 2017, in 1-D: BatchNorm in front of the convolutions, features concatenated."""

    def __init__(self, channels: int, classes: int, growth: int = 12) -> None:
        dense = [DenseLayer(24 + growth * k, growth) for k in range(4)]
        wide = 24 + 4 * growth
        super().__init__(
            nn.Conv1d(channels, 24, 7, padding=3, bias=False), *dense, nn.BatchNorm1d(wide), nn.ReLU(inplace=True),
            nn.Conv1d(wide, wide // 2, 1, bias=False), nn.AvgPool1d(2), nn.AdaptiveAvgPool1d(1), nn.Flatten(),
            nn.Linear(wide // 2, classes),
        )  # fmt: skip


class TimeCNN(nn.Module):
    """Zhao et al., 2017: sigmoids and mean pools, no BatchNorm."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv1d(channels, 6, 7), nn.Conv1d(6, 12, 7)
        self.pool, self.head = nn.AvgPool1d(3), nn.LazyLinear(classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.conv1(x).sigmoid())
        return self.head(torch.flatten(self.pool(torch.sigmoid(self.conv2(x))), start_dim=1))


class SharedEncoder(nn.Module):
    """Zheng et al., 2014 (multi-channel CNN), one encoder for all sensors: the same layers are called once per sensor."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv1d(1, 16, 5, padding=2), nn.BatchNorm1d(16), nn.ReLU(inplace=True), nn.MaxPool1d(2),
            nn.Conv1d(16, 16, 5, padding=2), nn.BatchNorm1d(16), nn.ReLU(inplace=True), nn.MaxPool1d(2),
        )  # fmt: skip
        self.head = nn.LazyLinear(classes)

    def forward(self, x: Tensor) -> Tensor:
        features = [self.encoder(x[:, k : k + 1]) for k in range(x.shape[1])]
        return self.head(torch.stack(features, dim=1).flatten(1))


class M5(nn.Module):
    """Dai et al., ICASSP 2017: raw audio, BatchNorm and ReLU applied in one expression."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        sizes = [(channels, 32, 16, 2), (32, 32, 3, 1), (32, 64, 3, 1)]
        self.convs = nn.ModuleList([nn.Conv1d(i, o, k, s, padding=k // 2) for i, o, k, s in sizes])
        self.norms = nn.ModuleList([nn.BatchNorm1d(o) for _, o, _, _ in sizes])
        self.pool, self.head = nn.MaxPool1d(2), nn.Linear(64, classes)

    def forward(self, x: Tensor) -> Tensor:
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = self.pool(F.relu(norm(conv(x))))
        return F.log_softmax(self.head(F.avg_pool1d(x, x.shape[-1]).permute(0, 2, 1)).squeeze(1), dim=-1)


class ModernTCNBlock(nn.Module):
    def __init__(self, variables: int, dims: int) -> None:
        super().__init__()
        wide = variables * dims
        self.variables, self.dims = variables, dims
        self.large = nn.Conv1d(wide, wide, 31, padding=15, groups=wide, bias=False)
        self.small = nn.Conv1d(wide, wide, 5, padding=2, groups=wide, bias=False)
        self.norm = nn.BatchNorm1d(wide)
        self.ffn1, self.ffn2 = self.mlp(wide, variables), self.mlp(wide, dims)

    @staticmethod
    def mlp(wide: int, groups: int) -> nn.Sequential:
        first, last = nn.Conv1d(wide, 2 * wide, 1, groups=groups), nn.Conv1d(2 * wide, wide, 1, groups=groups)
        return nn.Sequential(first, nn.GELU(), last)

    def forward(self, x: Tensor) -> Tensor:
        n, _, length = x.shape
        y = self.ffn1(self.norm(self.large(x) + self.small(x)))
        y = y.view(n, self.variables, self.dims, length).transpose(1, 2).reshape(n, -1, length)
        y = self.ffn2(y).view(n, self.dims, self.variables, length).transpose(1, 2).reshape(n, -1, length)
        return x + y


class ModernTCN(nn.Module):
    """Luo, Wang, ICLR 2024: large depthwise kernels with a small one beside them, grouped pointwise layers over two axes."""

    def __init__(self, channels: int, classes: int, dims: int = 8) -> None:
        super().__init__()
        self.dims = dims
        self.stem = nn.Sequential(nn.Conv1d(1, dims, 8, 4, padding=2), nn.BatchNorm1d(dims))
        self.blocks = nn.Sequential(*[ModernTCNBlock(channels, dims) for _ in range(2)])
        self.head = nn.LazyLinear(classes)

    def forward(self, x: Tensor) -> Tensor:
        n, channels, length = x.shape
        x = self.stem(x.reshape(n * channels, 1, length)).reshape(n, channels * self.dims, -1)
        return self.head(self.blocks(x).flatten(1))


MODELS: dict[str, Callable[[int, int], nn.Module]] = {
    "FCN": FCN,
    "ResNet (Wang)": ResNet1D,
    "T-ResNet (W1)": TResNet,
    "InceptionTime": InceptionTime,
    "XceptionTime": XceptionTime,
    "TCN, weight norm": lambda channels, classes: TCN(channels, classes, weight_norm),
    "TCN": TCN,
    "OmniScaleCNN": OmniScaleCNN,
    "MSResNet": MSResNet,
    "WaveNet": GatedTCN,
    "Encoder": Encoder,
    "DenseNet": DenseNet1D,
    "Time-CNN": TimeCNN,
    "one encoder for all sensors": SharedEncoder,
    "M5": M5,
    "ModernTCN": ModernTCN,
    "MobileNetV2 on windows (W2)": mobilenet_v2_on_windows,
    "ResNet-18 on windows (W3)": resnet18_on_windows,
    **BIOSIGNALS,
    **HYBRIDS,
}


def build(name: str) -> nn.Module:
    """The model of that name for windows of ``(CHANNELS, LENGTH)``, its lazy layers initialised."""
    model = MODELS[name](CHANNELS, CLASSES).eval()
    with torch.no_grad():
        model(torch.zeros(2, CHANNELS, LENGTH))
    return model
