"""Trainings per minute: many at once, against a plain loop over one after the other.

    python benchmarks/training.py [--runs 4 16 64 192] [--steps 200] [--repeat 3] [--models …]

A training is 5000 steps of Adam on fresh batches of 256 inputs of width 16, of ten tokens for
transformers, with the validation loss on 256 inputs after each step and the best parameters kept.
Both sides run for `--steps` steps, the plain loop for a third of them, in turn; the least times of
the repetitions are extrapolated. The runs that are trained at once have ranks 1 to 16 in turn and
see the same inputs; the plain loop trains one module at rank 8, with as many threads as make it
fastest. The ratio of work is that of processors' time, which depends less on what else they do.
"""

from __future__ import annotations

import argparse
import copy
import os
from collections.abc import Callable, Sequence
from functools import partial
from math import inf
from time import perf_counter, process_time
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from lorapower import _checks
from lorapower.networks import FNN, Transformer
from lorapower.training import Fresh, Tuning, train

WIDTH, HEADS, TOKENS, SAMPLES, STEPS, RANK = 16, 2, 10, 256, 5000, 8
SIZES = {
    "FNN (1,2)": (1, 2),
    "FNN (2,4)": (2, 4),
    "FNN (1,8)": (1, 8),
    "transformer 1": (1, 1),
    "transformer 2": (2, 2),
}


class LoRA(nn.Module):
    """``x ↦ (W + A Bᵀ) x`` on rows, with ``W`` frozen."""

    def __init__(self, weight: Tensor, rank: int) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.A = nn.Parameter(torch.zeros(weight.shape[0], rank))
        self.B = nn.Parameter(0.25 * torch.randn(weight.shape[1], rank))

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.weight + self.A @ self.B.T).T


class PlainFNN(nn.Module):
    def __init__(self, network: FNN, rank: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(LoRA(weight, rank) for weight in network.weights)
        self.biases = nn.ParameterList(nn.Parameter(bias.clone()) for bias in network.biases)

    def forward(self, x: Tensor) -> Tensor:
        for layer, bias in zip(self.layers, self.biases, strict=True):
            x = (layer(x) + bias).relu()
        return x


class PlainTransformer(nn.Module):
    def __init__(self, network: Transformer, rank: int) -> None:
        super().__init__()
        L, H = network.depth, network.heads

        def heads(stack: Tensor) -> nn.ModuleList:
            return nn.ModuleList(LoRA(w, rank) for w in stack.reshape(L * H, *stack.shape[-2:]))

        self.Q, self.K, self.V, self.O = map(
            heads, (network.W_Q, network.W_K, network.W_V, network.W_O)
        )
        self.W_1 = nn.ParameterList(nn.Parameter(w, requires_grad=False) for w in network.W_1)
        self.W_2 = nn.ModuleList(LoRA(w, rank) for w in network.W_2)
        self.b_1 = nn.ParameterList(nn.Parameter(b.clone()) for b in network.b_1)
        self.b_2 = nn.ParameterList(nn.Parameter(b.clone()) for b in network.b_2)
        self.out = LoRA(network.W_out, rank)
        self.L, self.H = L, H

    def forward(self, x: Tensor) -> Tensor:
        for l in range(self.L):
            attention = torch.zeros_like(x)
            for h in range(l * self.H, (l + 1) * self.H):
                pattern = (self.Q[h](x) @ self.K[h](x).mT).softmax(-1)
                attention = attention + self.O[h](pattern @ self.V[h](x))
            hidden = (attention @ self.W_1[l].T + self.b_1[l]).relu()
            x = self.W_2[l](hidden) + self.b_2[l]
        return self.out(x)


def networks(model: str) -> tuple[FNN | Transformer, FNN | Transformer, tuple[int, ...]]:
    """Make the frozen network, the target and an input's shape."""
    target_depth, depth = SIZES[model]
    if model.startswith("FNN"):
        frozen = FNN.random(depth, WIDTH, seed=0, dtype=torch.float32)
        return frozen, FNN.random(target_depth, WIDTH, seed=1, dtype=torch.float32), (WIDTH,)
    frozen, target = (
        Transformer.random(depth, WIDTH, HEADS, seed=seed, dtype=torch.float32) for seed in (0, 1)
    )
    return frozen, target, (WIDTH, TOKENS)


@_checks.flushing()
def plain(model: str, steps: int) -> None:
    """One run as one writes it down."""
    frozen, target, shape = networks(model)
    rows = shape[::-1]
    make: Any = PlainFNN if isinstance(frozen, FNN) else PlainTransformer
    module, wanted = make(frozen, RANK), make(target, 0)
    optimizer = torch.optim.Adam([p for p in module.parameters() if p.requires_grad], lr=1e-3)
    with torch.no_grad():
        x_validation = torch.randn(SAMPLES, *rows)
        y_validation = wanted(x_validation)
    least = inf
    for _ in range(steps):
        with torch.no_grad():
            x = torch.randn(SAMPLES, *rows)
            y = wanted(x)
        optimizer.zero_grad()
        mse_loss(module(x), y).backward()
        optimizer.step()
        with torch.no_grad():
            loss = mse_loss(module(x_validation), y_validation).item()
        if loss < least:
            least, _ = loss, copy.deepcopy(module.state_dict())


def stacked(model: str, runs: int, steps: int) -> None:
    """As many runs at once."""
    frozen, target, shape = networks(model)
    tunings = [Tuning(1 + run % WIDTH, learning_rate=1e-3) for run in range(runs)]
    train(frozen, tunings, Fresh(target, shape, samples=SAMPLES), steps=steps, every=1)


class Least:
    """The least wall time, and the least time of all processors, of calls of a function."""

    def __init__(self, function: Callable[[], object]) -> None:
        self.function, self.wall, self.processors = function, inf, inf

    def __call__(self) -> None:
        wall, processors = perf_counter(), process_time()
        self.function()
        self.wall = min(self.wall, perf_counter() - wall)
        self.processors = min(self.processors, process_time() - processors)


def on_threads(threads: int, function: Callable[[], object]) -> None:
    torch.set_num_threads(threads)
    function()


def compare(model: str, numbers: Sequence[int], steps: int, repeat: int, processors: int) -> None:
    """Print a line for each number of stacked runs."""
    few = -(-steps // 3)
    loops = [
        Least(partial(on_threads, threads, partial(plain, model, few)))
        for threads in range(1, processors + 1)
    ]
    for runs in numbers:
        # Memory and modules that are loaded once.
        stacked(model, runs, 1)
        engine = Least(partial(on_threads, processors, partial(stacked, model, runs, steps)))
        for _ in range(repeat):
            for measured in (*loops, engine):
                measured()
        loop = min(loops, key=lambda measured: measured.wall)
        one = STEPS / few * loop.wall
        each = STEPS / steps * engine.wall / runs
        work = (loop.processors / few) / (engine.processors / steps / runs)
        print(
            f"{model:13s} {runs:5d} {60 / each:10.1f} {60 / one:7.2f} ({1 + loops.index(loop)}) "
            f"{one / each:6.1f} {work:6.1f}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, nargs="+", default=[4, 16, 64, 192])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--models", choices=SIZES, nargs="+", default=list(SIZES))
    parser.add_argument("--processors", type=int, default=os.cpu_count())
    chosen = parser.parse_args()
    print(
        "                      trainings a minute   ratio, and\n"
        "model          runs   engine  plain (threads) of work"
    )
    for model in chosen.models:
        compare(model, chosen.runs, chosen.steps, chosen.repeat, chosen.processors)


if __name__ == "__main__":
    main()
