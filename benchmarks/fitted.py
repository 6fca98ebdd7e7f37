"""Time to fit adapters to inputs and to polish them, beside one run of Adam, by width.

    python benchmarks/fitted.py [--widths 16 64 256] [--inputs 4000] [--steps 5000]

ReLU networks, two layers from four, random, at an eighth of the width in rank, on one thread. The
polish is by L-BFGS alone. The growth is the exponent ``p`` of ``time ~ width^p`` from one width to
the next. Errors are relative to the variance of the outputs, on inputs that chose nothing.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from itertools import pairwise
from math import log
from time import perf_counter
from typing import Any

import torch

from lorapower import randomness
from lorapower.constructions import adapt_fitted
from lorapower.networks import FNN
from lorapower.regression import relative_error
from lorapower.training import Fresh, Tuning, polish, train


def timed(function: Callable[..., Any], *arguments: Any, **options: Any) -> tuple[Any, float]:
    start = perf_counter()
    found = function(*arguments, **options)
    return found, perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--widths", type=int, nargs="+", default=[16, 64, 256])
    parser.add_argument("--inputs", type=int, default=4000)
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--iterations", type=int, default=300)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})

    spent: dict[int, list[float]] = {}
    for width in chosen.widths:
        frozen = FNN.random(4, width, purpose="frozen")
        target = FNN.random(2, width, purpose="target")
        rank = max(1, width // 8)
        draw = randomness.generator(0, "inputs of a benchmark")
        inputs = [randomness.normal(draw, width, n) for n in (chosen.inputs, 2000)]
        # What is done once is not counted.
        data, tuning = Fresh(target, (width,)), Tuning(ranks=rank, learning_rate=1e-2)
        train(frozen, [tuning], data, steps=1)

        fit, fitting = timed(adapt_fitted, frozen, target, rank, *inputs, throw=False)
        options = {"iterations": chosen.iterations, "steps": 0, "throw": False}
        better, polishing = timed(polish, fit, *inputs, **options)
        adam = {"steps": chosen.steps, "every": 10}
        runs, training = timed(train, frozen, [tuning], data, **adam)
        trained = runs.network[0].to(torch.float64)
        test = fit.fused.split(*inputs).test
        error = relative_error(trained(test), target(test))
        print(
            f"width {width}, rank {rank}: fitted {fitting:.2f} s, error {fit.error:.3g}; "
            f"polished {polishing:.2f} s, {better.error:.3g}; Adam {training:.2f} s, {error:.3g}; "
            f"ratios to Adam {fitting / training:.2f}, {polishing / training:.2f}"
        )
        spent[width] = [fitting, polishing, training]
    for narrow, wide in pairwise(chosen.widths):
        growth = [
            log(b / a) / log(wide / narrow) for a, b in zip(spent[narrow], spent[wide], strict=True)
        ]
        words = ", ".join(f"{p:.1f}" for p in growth)
        print(f"growth from {narrow} to {wide} (fitted, polished, Adam): {words}")


if __name__ == "__main__":
    main()
