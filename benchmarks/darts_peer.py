"""A published forecaster in a process and an environment of its own: N-HiTS of darts, served over pipes.

Started by benchmarks.comparison with another Python (`--peer PYTHON`), because darts' dependencies are not Islet's.
Arrays come on stdin and go to stdout as .npy: first training values float32[N] and lengths int64[S] of the pieces on
the 5-minute grid, answered by the seconds that training took; then histories float32[B,24], answered by float32[B,12].
"""

import io
import os
import sys
import time
import warnings
from typing import Any

import numpy as np

HISTORY, HORIZONS = 24, 12
# As many windows as nn.LSTM sees in benchmarks.comparison, drawn at random; an epoch over all of them takes far longer.
STEPS, BATCH = 1500, 256
CENTRE_MG_DL, SCALE_MG_DL = 140.0, 60.0


def send(stream: Any, array: Any) -> None:
    """Write one array to a pipe: its length in bytes, then .npy."""
    memory = io.BytesIO()
    np.save(memory, array)
    stream.write(memory.tell().to_bytes(8, "big") + memory.getvalue())
    stream.flush()


def receive(stream: Any) -> Any:
    """Read what `send` wrote; None at the end of the stream."""
    size = stream.read(8)
    return np.load(io.BytesIO(stream.read(int.from_bytes(size, "big")))) if size else None


def train(values: Any, lengths: Any) -> Any:
    """Fit N-HiTS (Challu et al., AAAI 2023) as darts sets it up, on all pieces that are long enough."""
    from darts import TimeSeries
    from darts.models import NHiTSModel

    pieces = np.split((values - CENTRE_MG_DL) / SCALE_MG_DL, np.cumsum(lengths)[:-1])
    series = [TimeSeries.from_values(p) for p in pieces if len(p) >= HISTORY + HORIZONS]
    loop = {"max_steps": STEPS, "accelerator": "cpu", "logger": False}
    quiet = {"enable_progress_bar": False, "enable_model_summary": False}
    model = NHiTSModel(
        input_chunk_length=HISTORY,
        output_chunk_length=HORIZONS,
        batch_size=BATCH,
        n_epochs=1_000,
        random_state=0,
        save_checkpoints=False,
        pl_trainer_kwargs={**loop, **quiet},
    )
    model.fit(series, verbose=False)
    return model


def forecast(model: Any, histories: Any) -> Any:
    """Histories float32[B,24] in mg/dL to float32[B,12]."""
    from darts import TimeSeries

    series = [TimeSeries.from_values(h) for h in (histories - CENTRE_MG_DL) / SCALE_MG_DL]
    made = model.predict(HORIZONS, series=series, batch_size=1024, verbose=False, show_warnings=False)
    return np.stack([m.values()[:, 0] for m in made]) * SCALE_MG_DL + CENTRE_MG_DL


def main() -> None:
    """Train, then answer until stdin ends; whatever the libraries print goes to stderr."""
    warnings.filterwarnings("ignore")
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    import logging

    import pytorch_lightning  # noqa: F401 - it sets its loggers' level when it is imported
    import torch

    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    source = sys.stdin.buffer
    values, lengths = receive(source), receive(source)
    started = time.perf_counter()
    model = train(values, lengths)
    send(answers, np.float64(time.perf_counter() - started))
    while (histories := receive(source)) is not None:
        send(answers, forecast(model, histories).astype(np.float32))


if __name__ == "__main__":
    main()
