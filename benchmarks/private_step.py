"""One training step that is private per patient, beside the same step without privacy, Opacus's DPLSTM and jax_privacy.

A step is forward, backward and Adam for an LSTM with a linear head on its last hidden state, squared error, 12 outputs.
A patient has k windows; per-patient clipping takes their mean gradient as one. Where there is a GPU, steps run on it.

    python -m benchmarks.private_step [--quick] [--jax PYTHON]
    python -m benchmarks.private_step --memory VARIANT WINDOWS HIDDEN LAYERS K

PYTHON is the interpreter of an environment with jax_privacy, which then takes part in a process of its own.
"""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from benchmarks.measuring import ROOT, fresh_process, interleaved, table
from benchmarks.step_shape import CLIP, FEATURES, NOISE, OUTPUTS, STEPS, Shape, extra_megabytes
from pipeline.book_keeping import Book, add_clipped_gradients, parts_of
from pipeline.fitting import training_device
from pipeline.gate_tap import GateTap, last_hidden_recorded
from pipeline.noise import SeededNoise
from pipeline.private_training import PatientOptimizer

DEVICE = training_device()

SHAPES = [
    Shape(windows, hidden, layers, k)
    for windows in (256, 1024)
    for hidden in (16, 64, 128)
    for layers in (1, 2)
    for k in (1, 16)
]
QUICK = [Shape(256, 64, 1, 16), Shape(1024, 64, 1, 16)]
MEMORY = [Shape(256, 64, 1, 16), Shape(1024, 64, 1, 1), Shape(1024, 64, 1, 16), Shape(1024, 64, 2, 16)]


class Stack(nn.Module):
    """The product's layer, as many as asked for, with a linear head."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        sizes = [FEATURES] + [shape.hidden] * shape.layers
        self.taps = nn.ModuleList(GateTap(below, shape.hidden) for below in sizes[:-1])
        self.head = nn.Linear(shape.hidden, OUTPUTS)
        for p in self.parameters():
            nn.init.uniform_(p, -(shape.hidden**-0.5), shape.hidden**-0.5)
        self.book = Book()
        self.book.watch(self.head)

    def forward(self, x: Tensor) -> Tensor:
        """X [k,P,T,F] to outputs [k,P,12]."""
        taps = [tap for tap in self.taps if isinstance(tap, GateTap)]
        hidden, pairs = last_hidden_recorded(x, taps)
        for tap, pair in zip(taps, pairs, strict=True):
            self.book.note_tap(tap, *pair)
        out: Tensor = self.head(hidden)
        return out


def data(shape: Shape) -> tuple[Tensor, Tensor]:
    """Inputs [k,P,T,F] and targets [k,P,12]."""
    draw = torch.Generator().manual_seed(0)
    return (
        torch.randn(shape.k, shape.patients, STEPS, FEATURES, generator=draw).to(DEVICE),
        torch.randn(shape.k, shape.patients, OUTPUTS, generator=draw).to(DEVICE),
    )


def not_private(shape: Shape) -> Callable[[], None]:
    """torch.nn.LSTM and a linear head."""
    lstm = nn.LSTM(FEATURES, shape.hidden, shape.layers, batch_first=True).to(DEVICE)
    head = nn.Linear(shape.hidden, OUTPUTS).to(DEVICE)
    adam = torch.optim.Adam([*lstm.parameters(), *head.parameters()])
    x, y = (part.flatten(0, 1) for part in data(shape))

    def step() -> None:
        adam.zero_grad()
        (head(lstm(x)[1][0][-1]) - y).square().mean().backward()
        adam.step()

    return step


def islet(shape: Shape) -> Callable[[], None]:
    """The product's layer with book-keeping, Opacus's optimizer around Adam."""
    model = Stack(shape).to(DEVICE)
    private = PatientOptimizer(
        torch.optim.Adam(model.parameters()),
        noise_multiplier=NOISE,
        max_grad_norm=CLIP,
        expected_batch_size=shape.patients,
    )
    private.source = SeededNoise(0)
    x, y = data(shape)

    def step() -> None:
        private.zero_grad()
        for patients in parts_of(x, shape.hidden):
            losses = (model(x[:, patients]) - y[:, patients]).square().mean(dim=(0, 2))
            add_clipped_gradients(model.book.take(), losses.sum(), CLIP)
        private.step()

    return step


def opacus_dplstm(shape: Shape) -> Callable[[], None]:
    """Opacus's DPLSTM with its hooks; it clips per window, so the windows of a patient are clipped one by one."""
    from opacus import GradSampleModule
    from opacus.layers import DPLSTM
    from opacus.optimizers import DPOptimizer

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = DPLSTM(FEATURES, shape.hidden, shape.layers, batch_first=True)
            self.head = nn.Linear(shape.hidden, OUTPUTS)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.head(self.lstm(x)[1][0][-1])
            return out

    model = GradSampleModule(Model().to(DEVICE))
    private = DPOptimizer(
        torch.optim.Adam(model.parameters()),
        noise_multiplier=NOISE,
        max_grad_norm=CLIP,
        expected_batch_size=shape.windows,
    )
    x, y = (part.flatten(0, 1) for part in data(shape))

    def step() -> None:
        private.zero_grad()
        (model(x) - y).square().mean().backward()
        private.step()

    return step


FLOOR, DPLSTM, JAX = "nn.LSTM, not private", "Opacus DPLSTM", "jax_privacy"
VARIANTS = {FLOOR: not_private, "Islet": islet, DPLSTM: opacus_dplstm}


@contextmanager
def jax_step(python: str, shape: Shape) -> Iterator[Callable[[], float]]:
    """Yield jax_privacy's step in a process of `python`: each call is one step, and returns its milliseconds there."""
    command = [python, "-m", "benchmarks.jax_step", *shape.cells]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as peer:
        if peer.stdin is None or peer.stdout is None:
            raise TypeError("the peer has no pipes")
        ask, answers = peer.stdin, peer.stdout

        def step() -> float:
            ask.write("\n")
            ask.flush()
            return float(answers.readline())

        yield step
        ask.close()


def speed_rows(shapes: list[Shape], seconds: float, jax: str | None) -> None:
    """Print one row a shape: the floor's milliseconds and each other variant's ratio to it.

    DPLSTM takes seconds a step: it is measured in one turn, and where k is 16 (k changes nothing for it).
    """
    for shape in shapes:
        made: dict[str, Callable[[], float | None]] = {
            name: make(shape) for name, make in VARIANTS.items() if name != DPLSTM or shape.k > 1
        }
        if jax is None:
            got = interleaved(made, seconds=seconds, slow=[DPLSTM])
        else:
            with jax_step(jax, shape) as step:
                got = interleaved(made | {JAX: step}, seconds=seconds, slow=[DPLSTM])
        ratios = [f"{got[name][1]:.2f}" if name in got else "-" for name in ("Islet", DPLSTM, JAX)]
        faster = f"{got[DPLSTM][1] / got['Islet'][1]:.0f}" if DPLSTM in got else "-"
        print("| " + " | ".join([*shape.cells, f"{got[FLOOR][0]:.0f}", *ratios, faster]) + " |", flush=True)


def gpu_restart() -> float:
    """Let the record of the GPU's memory start again from what tensors take now, in MB."""
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated() / 2**20


def gpu_peak() -> float:
    """Most memory that tensors took on the GPU, in MB."""
    return torch.cuda.max_memory_allocated() / 2**20


def memory_rows(shapes: list[Shape], jax: str | None) -> None:
    """Print one row a shape: extra megabytes of each variant (a GPU's where there is one), each in its own process."""
    for shape in shapes:
        ours = [fresh_process("benchmarks.private_step", "--memory", name, *shape.cells) for name in VARIANTS]
        peer = "-" if jax is None else fresh_process("benchmarks.jax_step", "--memory", *shape.cells, python=jax)
        print("| " + " | ".join([*shape.cells, *ours, peer]) + " |", flush=True)


def main(arguments: list[str]) -> None:
    """Print both tables, or one variant's memory."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if arguments[:1] == ["--memory"]:
        meter = (gpu_restart, gpu_peak) if DEVICE.type == "cuda" else ()
        print(f"{extra_megabytes(VARIANTS[arguments[1]], Shape.of(arguments[2:]), *meter):.0f}")
        return
    quick = "--quick" in arguments
    jax = arguments[arguments.index("--jax") + 1] if "--jax" in arguments else None
    sizes = ["windows", "hidden", "layers", "k"]
    where = torch.cuda.get_device_name(DEVICE) if DEVICE.type == "cuda" else "one thread"
    print(f"A training step as a ratio to nn.LSTM without privacy, medians of interleaved turns, {where}\n")
    print(table([*sizes, "nn.LSTM ms", "Islet", DPLSTM, JAX, "times faster than DPLSTM"], []), flush=True)
    speed_rows(QUICK if quick else SHAPES, 2.0, jax)
    print("\nExtra peak memory of a step in MB, each in a fresh process\n")
    print(table([*sizes, *VARIANTS, JAX], []), flush=True)
    memory_rows(MEMORY[:2] if quick else MEMORY, jax)


if __name__ == "__main__":
    main(sys.argv[1:])
