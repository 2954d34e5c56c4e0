"""Networks of the time-series field that join convolutions with an LSTM or attention; the rest of
:mod:`benchmarks.time_series_models`."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class DeepConvLSTM(nn.Module):
    """Ordóñez, Roggen, Sensors 2016: four convolutions along time on every sensor, two LSTM layers."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.convs = nn.ModuleList([nn.Conv2d(1 if k == 0 else 64, 64, (5, 1)) for k in range(4)])
        self.lstm = nn.LSTM(64 * channels, 64, num_layers=2, batch_first=True)
        self.drop, self.head = nn.Dropout(0.5), nn.Linear(64, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(1, 2).unsqueeze(1)
        for conv in self.convs:
            x = torch.relu(conv(x))
        n, maps, length, sensors = x.shape
        x, _ = self.lstm(x.permute(0, 2, 1, 3).reshape(n, length, maps * sensors))
        return self.head(self.drop(x[:, -1]))


class SqueezeExcite(nn.Module):
    def __init__(self, maps: int, reduction: int = 16) -> None:
        super().__init__()
        self.fc = nn.Sequential(nn.Linear(maps, maps // reduction), nn.ReLU(), nn.Linear(maps // reduction, maps), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        return x * self.fc(x.mean(-1)).unsqueeze(-1)


class LSTMFCN(nn.Module):
    """Karim et al., Neural Networks 2019 (MLSTM-FCN): an FCN with squeeze-and-excitation beside an LSTM."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.lstm = nn.LSTM(channels, 16, batch_first=True)
        self.conv1, self.bn1, self.se1 = nn.Conv1d(channels, 128, 8, padding="same"), nn.BatchNorm1d(128), SqueezeExcite(128)
        self.conv2, self.bn2, self.se2 = nn.Conv1d(128, 256, 5, padding="same"), nn.BatchNorm1d(256), SqueezeExcite(256)
        self.conv3, self.bn3 = nn.Conv1d(256, 128, 3, padding="same"), nn.BatchNorm1d(128)
        self.drop, self.head = nn.Dropout(0.8), nn.Linear(144, classes)

    def forward(self, x: Tensor) -> Tensor:
        _, (state, _) = self.lstm(x.transpose(1, 2))
        y = self.se1(self.bn1(self.conv1(x)).relu())
        y = self.se2(self.bn2(self.conv2(y)).relu())
        y = self.bn3(self.conv3(y)).relu_()
        return self.head(torch.cat((y.mean(-1), self.drop(state[-1])), 1))


class TinyHAR(nn.Module):
    """Zhou et al., ISWC 2022: convolutions along time on each sensor, attention across sensors, an LSTM."""

    def __init__(self, channels: int, classes: int, maps: int = 16) -> None:
        super().__init__()
        convs = [nn.Conv2d(1 if k == 0 else maps, maps, (5, 1), (1 + k % 2, 1)) for k in range(4)]
        self.convs = nn.ModuleList([nn.Sequential(conv, nn.ReLU(inplace=True), nn.BatchNorm2d(maps)) for conv in convs])
        self.across = nn.MultiheadAttention(maps, 2, batch_first=True)
        self.lstm = nn.LSTM(maps * channels, 32, batch_first=True)
        self.score, self.head = nn.Linear(32, 1), nn.Linear(32, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(1, 2).unsqueeze(1)
        for block in self.convs:
            x = block(x)
        n, maps, length, sensors = x.shape
        tokens = x.permute(0, 2, 3, 1).reshape(n * length, sensors, maps)
        tokens = tokens + self.across(tokens, tokens, tokens, need_weights=False)[0]
        y, _ = self.lstm(tokens.reshape(n, length, sensors * maps))
        return self.head((y * self.score(y).softmax(dim=1)).sum(1))


class ConvTransformer(nn.Module):
    """Foumani et al., DMKD 2024 (ConvTran), in short: convolutions along time and across sensors, then self-attention."""

    def __init__(self, channels: int, classes: int, maps: int = 32) -> None:
        super().__init__()
        self.embed = nn.Sequential(nn.Conv2d(1, 2 * maps, (1, 8), padding="same"), nn.BatchNorm2d(2 * maps), nn.GELU())
        self.across = nn.Sequential(nn.Conv2d(2 * maps, maps, (channels, 1)), nn.BatchNorm2d(maps), nn.GELU())
        self.encoder = nn.TransformerEncoderLayer(maps, 4, 64, dropout=0.0, batch_first=True)
        self.head = nn.Linear(maps, classes)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.across(self.embed(x.unsqueeze(1))).squeeze(2).permute(0, 2, 1)
        return self.head(F.layer_norm(self.encoder(tokens), (tokens.shape[-1],)).mean(1))


HYBRIDS: dict[str, Callable[[int, int], nn.Module]] = {
    "DeepConvLSTM": DeepConvLSTM,
    "LSTM-FCN": LSTMFCN,
    "TinyHAR": TinyHAR,
    "convolutions and a transformer": ConvTransformer,
}
