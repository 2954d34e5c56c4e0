"""Networks for EEG and ECG; the rest of :mod:`benchmarks.time_series_models`."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .time_series_hybrids import SqueezeExcite


class EEGNet(nn.Module):
    """Lawhern et al., JNE 2018: temporal, depthwise spatial and separable convolutions on ``(N, 1, channels, length)``."""

    def __init__(self, channels: int, classes: int, f1: int = 8, depth: int = 2) -> None:
        super().__init__()
        f2 = f1 * depth
        self.temporal, self.bn1 = nn.Conv2d(1, f1, (1, 32), padding="same", bias=False), nn.BatchNorm2d(f1)
        self.spatial, self.bn2 = nn.Conv2d(f1, f2, (channels, 1), groups=f1, bias=False), nn.BatchNorm2d(f2)
        self.depthwise = nn.Conv2d(f2, f2, (1, 16), padding=(0, 8), groups=f2, bias=False)
        self.pointwise, self.bn3 = nn.Conv2d(f2, f2, 1, bias=False), nn.BatchNorm2d(f2)
        self.drop = nn.Dropout(0.25)
        self.head = nn.LazyLinear(classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn1(self.temporal(x.unsqueeze(1)))
        x = self.drop(F.avg_pool2d(F.elu(self.bn2(self.spatial(x))), (1, 4)))
        x = self.drop(F.avg_pool2d(F.elu(self.bn3(self.pointwise(self.depthwise(x)))), (1, 8)))
        return self.head(x.flatten(1))


class ShallowConvNet(nn.Module):
    """Schirrmeister et al., HBM 2017: two convolutions, square, mean pool, logarithm; a convolution as the classifier."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.time = nn.Conv2d(1, 40, (13, 1))
        self.space = nn.Conv2d(40, 40, (1, channels), bias=False)
        self.bn = nn.BatchNorm2d(40, momentum=0.1, affine=True)
        self.drop = nn.Dropout(0.5)
        self.classifier = nn.Conv2d(40, classes, (4, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(self.space(self.time(x.transpose(1, 2)[:, None])))
        x = F.avg_pool2d(x * x, (16, 1), (12, 1))
        return self.classifier(self.drop(torch.log(torch.clamp(x, min=1e-6))))[:, :, 0, 0]


class DeepConvNet(nn.Module):
    """Schirrmeister et al., HBM 2017: four blocks of convolution, BatchNorm, ELU and max-pool."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(1, 25, (1, 5)), nn.Conv2d(25, 25, (channels, 1), bias=False)]
        inputs = 25
        for k, maps in enumerate((25, 50, 100)):
            layers += [nn.Conv2d(inputs, maps, (1, 5), padding=(0, 2), bias=False)] if k else []
            layers += [nn.BatchNorm2d(maps), nn.ELU(), nn.MaxPool2d((1, 2)), nn.Dropout(0.5)]
            inputs = maps
        self.features = nn.Sequential(*layers)
        self.head = nn.LazyLinear(classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.flatten(self.features(x[:, None]), 1))


class SEResNet1D(nn.Module):
    """Ribeiro et al., Nature Communications 2020, for ECG, with squeeze-and-excitation.

    The shortcuts are max-pool and a 1x1 convolution.
    """

    class Unit(nn.Module):
        def __init__(self, inputs: int, maps: int) -> None:
            super().__init__()
            self.conv1, self.bn1 = nn.Conv1d(inputs, maps, 17, padding=8, bias=False), nn.BatchNorm1d(maps)
            self.conv2, self.bn2 = nn.Conv1d(maps, maps, 17, 2, padding=8, bias=False), nn.BatchNorm1d(maps)
            self.skip = nn.Sequential(nn.MaxPool1d(2), nn.Conv1d(inputs, maps, 1, bias=False))
            self.relu, self.se = nn.ReLU(), SqueezeExcite(maps, 8)
            self.drop1, self.drop2 = nn.Dropout(0.2), nn.Dropout(0.2)

        def forward(self, pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            x, y = pair
            x = self.conv2(self.drop1(self.relu(self.bn1(self.conv1(x)))))
            x = x + self.skip(y)
            y = x
            return self.drop2(self.relu(self.se(self.bn2(x)))), y

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv1d(channels, 32, 17, padding=8, bias=False), nn.BatchNorm1d(32)
        self.units = nn.ModuleList([SEResNet1D.Unit(32, 48), SEResNet1D.Unit(48, 64)])
        self.head = nn.LazyLinear(classes)

    def forward(self, x: Tensor) -> Tensor:
        pair = (x := F.relu(self.bn(self.conv(x))), x)
        for unit in self.units:
            pair = unit(pair)
        return self.head(pair[0].flatten(1))


class UNet1D(nn.Module):
    """Ronneberger et al., 2015, in 1-D, as for ECG delineation; logits for every sample: ``(N, classes, length)``."""

    @staticmethod
    def twice(inputs: int, maps: int) -> nn.Sequential:
        return nn.Sequential(
            nn.Conv1d(inputs, maps, 3, padding=1, bias=False), nn.BatchNorm1d(maps), nn.ReLU(inplace=True),
            nn.Conv1d(maps, maps, 3, padding=1, bias=False), nn.BatchNorm1d(maps), nn.ReLU(inplace=True),
        )  # fmt: skip

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.down1, self.down2, self.bottom = (
            self.twice(channels, 16),
            self.twice(16, 32),
            self.twice(32, 64),
        )
        self.up2, self.up1 = nn.ConvTranspose1d(64, 32, 2, 2), nn.ConvTranspose1d(32, 16, 2, 2)
        self.join2, self.join1 = self.twice(64, 32), self.twice(32, 16)
        self.last = nn.Conv1d(16, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = self.down1(x)
        b = self.down2(F.max_pool1d(a, 2))
        y = self.up2(self.bottom(F.max_pool1d(b, 2)))
        y = self.up1(self.join2(torch.cat([b, F.pad(y, (0, b.shape[-1] - y.shape[-1]))], 1)))
        return self.last(self.join1(torch.cat([a, y], 1)))


BIOSIGNALS: dict[str, Callable[[int, int], nn.Module]] = {
    "EEGNet": EEGNet,
    "ShallowConvNet": ShallowConvNet,
    "DeepConvNet": DeepConvNet,
    "SE-ResNet": SEResNet1D,
    "U-Net": UNet1D,
}
