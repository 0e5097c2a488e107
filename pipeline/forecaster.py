"""The forecaster: one LSTM layer (pipeline.gate_tap) whose output is a residual on the last reading.

Inputs may carry leading dimensions, for instance [windows, patients, T, F].
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional

from data_schemas.units import HORIZON_MINUTES, QUANTILES, SENSOR_MAX_MG_DL, SENSOR_MIN_MG_DL
from pipeline.book_keeping import Book
from pipeline.gate_tap import GateTap, last_hidden, last_hidden_recorded
from pipeline.windows import FEATURES, RESIDUAL_SCALE_MG_DL, SPREAD_SCALE_MG_DL

HORIZONS = len(HORIZON_MINUTES)
_MEDIAN = QUANTILES.index(0.50)
_SPREAD_CHANNEL = FEATURES.index("day_spread")
_GATE_CENTRE_MG_DL = 32.0
_GATE_WIDTH_MG_DL = 4.0


@dataclass(frozen=True, slots=True)
class ForecasterSpec:
    """Shape of the model; equal specs give interchangeable flat weights."""

    hidden_size: int = 32
    features: int = len(FEATURES)


class Forecaster(nn.Module):
    """LSTM, a linear head for the mean and one for the quantiles, all as residuals on the last reading.

    The last hidden state is handed to the heads twice, scaled by g and by 1 - g, where g tells a person
    whose last day varied widely (as with type 1 diabetes) from one whose day was calm: the two kinds share
    the LSTM without pulling at one head. `mix` is a fixed linear change of basis before the heads, set from
    public data by `whiten` so that private gradients are well conditioned; it is never trained.  The
    quantile head gives the median's offset from the mean and four logits of increments, passed through
    softplus, so quantiles cannot cross.
    """

    def __init__(self, spec: ForecasterSpec | None = None, *, seed: int = 0) -> None:
        super().__init__()
        self.spec = spec or ForecasterSpec()
        width = 2 * self.spec.hidden_size + 1
        self.tap = GateTap(self.spec.features, self.spec.hidden_size)
        self.mix = nn.Linear(width, width).requires_grad_(False)
        self.mean_head = nn.Linear(width, HORIZONS)
        self.quantile_head = nn.Linear(width, HORIZONS * len(QUANTILES))
        self.tapped = False
        self.book: Book | None = None
        self._initialise(seed)

    def _initialise(self, seed: int) -> None:
        """Weights are a function of the seed alone: orthogonal recurrence, forget bias 1, heads near zero."""
        draw = torch.Generator().manual_seed(seed)
        size = self.spec.hidden_size
        with torch.no_grad():
            bound = math.sqrt(6.0 / (self.spec.features + size))
            self.tap.weight_ih.uniform_(-bound, bound, generator=draw)
            for gate in range(4):
                rows = self.tap.weight_hh[gate * size : (gate + 1) * size]
                rows.copy_(torch.linalg.qr(torch.randn(size, size, generator=draw))[0])
            self.tap.bias.zero_()
            self.tap.bias[size : 2 * size] = 1.0
            self.mix.weight.copy_(torch.eye(2 * size + 1))
            self.mix.bias.zero_()
            for head in (self.mean_head, self.quantile_head):
                head.weight.normal_(0.0, 0.1 / math.sqrt(size), generator=draw)
                head.bias.zero_()

    def encode(self, x: Tensor) -> Tensor:
        """X [..., T, F] to the inputs of the heads [..., 2H+1].

        By torch's own LSTM; where `tapped` is set through the tap, noted in the `book` if there is one.
        """
        encoded: Tensor = self.mix(split_by_spread(self._last_hidden(x), x))
        return encoded

    def _last_hidden(self, x: Tensor) -> Tensor:
        """X [..., T, F] to the last hidden state [..., H]."""
        lead = x.shape[:-2]
        tap = self.tap
        flat = x.reshape(-1, *x.shape[-2:])
        if not self.tapped:
            start = flat.new_zeros(1, flat.shape[0], self.spec.hidden_size)
            weights = [tap.weight_ih, tap.weight_hh, tap.bias, torch.zeros_like(tap.bias)]
            hidden: Tensor = torch.lstm(flat, (start, start), weights, True, 1, 0.0, self.training, False, True)[1]
            return hidden[0].reshape(*lead, -1)
        if self.book is None:
            return last_hidden(x, [tap])
        hidden, [pair] = last_hidden_recorded(x, [tap])
        self.book.note_tap(tap, *pair)
        return hidden

    def read_out(self, encoded: Tensor) -> tuple[Tensor, Tensor]:
        """Read encoded [..., 2H+1] out as residuals in mg/dL: mean [..., 12] and quantiles [..., 12, 5], increasing."""
        mean = self.mean_head(encoded)
        shape = self.quantile_head(encoded).unflatten(-1, (HORIZONS, len(QUANTILES)))
        median = mean + shape[..., _MEDIAN]
        step = functional.softplus(shape)
        down_1 = median - step[..., 1]
        up_1 = median + step[..., 3]
        quantiles = torch.stack((down_1 - step[..., 0], down_1, median, up_1, up_1 + step[..., 4]), dim=-1)
        scale = mean.new_tensor(RESIDUAL_SCALE_MG_DL)
        return mean * scale, quantiles * scale.unsqueeze(-1)

    def residuals(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """X [..., T, F] to unclipped residuals in mg/dL: mean [..., 12] and quantiles [..., 12, 5]."""
        return self.read_out(self.encode(x))

    def forward(self, x: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
        """X [..., T, F] and last [...] mg/dL to forecast [..., 12] and quantiles [..., 12.

        5] in mg/dL within 40..400.
        """
        mean, quantiles = self.residuals(x)
        return clip_to_sensor(mean, quantiles, last)


class InferenceForecaster(nn.Module):
    """The same forecast with torch's own LSTM layer: for export, with no hand-written autograd in the graph."""

    def __init__(self, model: Forecaster) -> None:
        super().__init__()
        self.lstm = nn.LSTM(model.spec.features, model.spec.hidden_size, batch_first=True)
        self.heads = Forecaster(model.spec)
        self.heads.load_state_dict(model.state_dict())
        with torch.no_grad():
            tap = model.tap
            sources = (tap.weight_ih, tap.weight_hh, tap.bias, torch.zeros_like(tap.bias))
            for target, source in zip(self.lstm.parameters(), sources, strict=True):
                target.copy_(source)
        self.requires_grad_(False).eval()

    def forward(self, x: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
        """X [B,T,F] and last [B] mg/dL to forecast [B,12] and quantiles [B,12,5] in mg/dL within 40..400."""
        _, (hidden, _) = self.lstm(x)
        mean, quantiles = self.heads.read_out(self.heads.mix(split_by_spread(hidden[-1], x)))
        return clip_to_sensor(mean, quantiles, last)


def split_by_spread(hidden: Tensor, x: Tensor) -> Tensor:
    """Hidden [..., H] and x [..., T, F] to [..., 2H+1].

    G h, (1 - g) h and g, with g near 1 after a day that varied widely.
    """
    spread_mg_dl = x[..., -1, _SPREAD_CHANNEL : _SPREAD_CHANNEL + 1] * SPREAD_SCALE_MG_DL
    gate = torch.sigmoid((spread_mg_dl - _GATE_CENTRE_MG_DL) / _GATE_WIDTH_MG_DL)
    return torch.cat((gate * hidden, (1 - gate) * hidden, gate), dim=-1)


def whiten(model: Forecaster, x: npt.NDArray[np.float32], *, floor: float = 1e-2) -> None:
    """Change the basis before the heads, in place.

    So that their inputs have unit second moment on PUBLIC windows x [B,T,F].

    Forecasts stay the same. Directions with less variance than `floor` are not blown up beyond it. Steps of
    plain SGD on the heads, and the noise on them, are then equally large in every direction the inputs take.
    """
    with torch.no_grad():
        inputs = split_by_spread(model._last_hidden(torch.from_numpy(x)), torch.from_numpy(x)).double()
        centre = inputs.mean(dim=0)
        spread, basis = torch.linalg.eigh((inputs - centre).T @ (inputs - centre) / len(inputs))
        to_white = (basis * (spread + floor).rsqrt()) @ basis.T
        old_mix_bias = model.mix.bias.double()
        for head in (model.mean_head, model.quantile_head):
            weight = head.weight.double()
            raw = weight @ model.mix.weight.double()
            head.bias.copy_(head.bias.double() + weight @ old_mix_bias + raw @ centre)
            head.weight.copy_(raw @ torch.linalg.inv(to_white))
        model.mix.weight.copy_(to_white)
        model.mix.bias.copy_(-(to_white @ centre))


def clip_to_sensor(mean: Tensor, quantiles: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
    """Residuals and last reading [...] to glucose in mg/dL, clipped to what a sensor can report."""
    forecast = (last.unsqueeze(-1) + mean).clamp(SENSOR_MIN_MG_DL, SENSOR_MAX_MG_DL)
    levels = (last.unsqueeze(-1).unsqueeze(-1) + quantiles).clamp(SENSOR_MIN_MG_DL, SENSOR_MAX_MG_DL)
    return forecast, levels


def window_losses(
    mean: Tensor, quantiles: Tensor, target: Tensor, mask: Tensor, *, pinball_weight: float = 1.0
) -> Tensor:
    """Loss of each window [...]: squared error of the mean plus weighted pinball loss, averaged over real targets.

    mean, target: residuals [..., 12] in mg/dL; quantiles [..., 12, 5]; mask [..., 12]. Errors are divided by
    RESIDUAL_SCALE_MG_DL, so every horizon counts alike and a typical loss is near one. A window without
    targets costs 0.
    """
    scale = mean.new_tensor(RESIDUAL_SCALE_MG_DL)
    weight = mask.to(mean.dtype)
    share = weight / weight.sum(-1, keepdim=True).clamp(min=1.0)
    squared = ((mean - target) / scale).square()
    error = (target.unsqueeze(-1) - quantiles) / scale.unsqueeze(-1)
    level = mean.new_tensor(QUANTILES)
    pinball = torch.maximum(level * error, (level - 1.0) * error).mean(-1)
    return ((squared + pinball_weight * pinball) * share).sum(-1)


def flatten(model: Forecaster) -> npt.NDArray[np.float32]:
    """All weights as one float32[D] vector: tap (ih, hh, bias), mix, mean head, quantile head."""
    return np.concatenate([p.detach().cpu().numpy().ravel() for p in model.parameters()]).astype(np.float32)


def unflatten(weights: npt.NDArray[np.float32], spec: ForecasterSpec) -> Forecaster:
    """Build the model with these weights float32[D]; a wrong length is refused."""
    model = Forecaster(spec)
    load_flat(model, weights)
    return model


def load_flat(model: Forecaster, weights: npt.NDArray[np.float32]) -> None:
    """Overwrite the weights of a model in place from float32[D]."""
    if weights.shape != (weight_count(model.spec),):
        raise ValueError(f"expected {weight_count(model.spec)} weights, got shape {weights.shape}")
    at = 0
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.from_numpy(np.ascontiguousarray(weights[at : at + p.numel()], dtype=np.float32)).view_as(p))
            at += p.numel()


def weight_count(spec: ForecasterSpec) -> int:
    """D: length of the flat weights."""
    size, outputs = spec.hidden_size, HORIZONS * (1 + len(QUANTILES))
    width = 2 * size + 1
    return 4 * size * (spec.features + size + 1) + (width + 1) * (width + outputs)


def mean_head_slice(spec: ForecasterSpec) -> slice:
    """Place of the mean head in the flat weights; what lies before it makes the features, the quantile head follows."""
    size = 2 * spec.hidden_size + 2
    end = weight_count(spec) - size * HORIZONS * len(QUANTILES)
    return slice(end - size * HORIZONS, end)


def mean_heads(
    heads: npt.NDArray[np.float32],
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Read flat mean heads [k, 12 (2H+2)]: weight [k, 12, 2H+1] and bias [k, 12], features to mg/dL."""
    scale, split = np.array(RESIDUAL_SCALE_MG_DL, dtype=np.float32), heads.shape[1] - HORIZONS
    return heads[:, :split].reshape(len(heads), HORIZONS, -1) * scale[:, None], heads[:, split:] * scale


def predict(
    model: Forecaster, x: npt.NDArray[np.float32], last: npt.NDArray[np.float32], *, batch_size: int = 4096
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Forecasts [B,12] and quantiles [B,12,5] in mg/dL for x [B,T,F] and last [B] mg/dL."""
    forecasts = np.empty((len(x), HORIZONS), dtype=np.float32)
    quantiles = np.empty((len(x), HORIZONS, len(QUANTILES)), dtype=np.float32)
    with torch.inference_mode():
        for at in range(0, len(x), batch_size):
            part = slice(at, at + batch_size)
            forecast, levels = model(torch.from_numpy(x[part]), torch.from_numpy(last[part]))
            forecasts[part], quantiles[part] = forecast.numpy(), levels.numpy()
    return forecasts, quantiles
