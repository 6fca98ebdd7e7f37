"""Time and error of ways to train adapters, beside the study's grid, on the same problems.

    python benchmarks/optimization.py [--problems 5] [--steps 5000] [--layers 2]

The grid has twelve runs; its best is chosen by validation, and so are those of the others. Each way
is timed by itself, once. Errors are relative to the variance of
the outputs, on new inputs; their median and the summed time of all problems are shown.
"""

from __future__ import annotations

import argparse
from statistics import median
from time import perf_counter
from typing import Any

from lorapower.experiments import sweeps
from lorapower.experiments.study import Setting, Trained, TrainedFused, measure
from lorapower.experiments.synthetic import Synthetic

# The study's grid of Adam.
GRID = {"learning_rate": [1e-2, 1e-3, 1e-4], "weight_decay": [0.0, 1e-4, 1e-3, 1e-2]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--problems", type=int, default=5)
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--layers", type=int, default=2, help="of the targets")
    chosen = parser.parse_args()

    better = Trained(ranks=8, learning_rate=1e-2, schedule="cosine", loss="one-sided")
    ways: dict[str, list[Trained] | list[TrainedFused]] = {
        "study's grid": sweeps.grid(Trained, ranks=8, **GRID),
        "one-sided": [better],
        "fused, 8 runs": [TrainedFused(ranks=8, learning_rates=(1e-2, 3e-2))],
    }
    problems = sweeps.grid(
        Synthetic,
        target_depth=chosen.layers,
        depth=2 * chosen.layers,
        steps=chosen.steps,
        every=10,
        seed=range(chosen.problems),
    )
    base = 0.0
    for name, methods in ways.items():
        errors, start = [], perf_counter()
        for problem in problems:
            found: list[Any] = measure([Setting(problem=problem, method=m) for m in methods])
            best = min(found, key=lambda one: one.validation_loss)
            errors.append(best.error / best.variance)
        taken = perf_counter() - start
        base = base or taken
        print(f"{name:22} {taken:7.1f} s, {taken / base:5.2f} of the grid's; {median(errors):.1e}")


if __name__ == "__main__":
    main()
