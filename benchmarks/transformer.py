"""Time to construct the adapters of one transformer, by width, and how it grows.

    python benchmarks/transformer.py [--widths 16 64 256] [--blocks 2] [--heads 2] [--repeat 3]

At the rank threshold of random networks, in double precision; the least of some repetitions. The
growth is the exponent ``p`` of ``time ~ width^p`` from one width to the next. The time of one
forward pass of ten tokens stands beside it.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from itertools import pairwise
from math import log
from time import perf_counter

import torch

from lorapower import randomness
from lorapower.constructions import adapt_transformer
from lorapower.networks import Transformer


def least_time(repeat: int, function: Callable[..., object], *arguments: object) -> float:
    times = []
    for _ in range(repeat):
        start = perf_counter()
        function(*arguments)
        times.append(perf_counter() - start)
    return min(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--widths", type=int, nargs="+", default=[16, 64, 256])
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--heads", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=3)
    chosen = parser.parse_args()

    print(f"{chosen.blocks} blocks, {chosen.heads} heads, {torch.get_num_threads()} threads")
    times = []
    for width in chosen.widths:
        frozen, target = (
            Transformer.random(chosen.blocks, width, chosen.heads, scale=width**-0.5, seed=seed)
            for seed in (1, 2)
        )
        rank = -(-width // 2)
        x = torch.randn(
            20, width, 10, dtype=frozen.dtype, generator=randomness.generator(0, "inputs")
        )
        solution = adapt_transformer(frozen, target, rank)
        difference = solution.adapters.merge(frozen)(x) - target(x)
        error = difference.square().mean() / target(x).square().mean()
        times.append(least_time(chosen.repeat, adapt_transformer, frozen, target, rank))
        forward = least_time(chosen.repeat, frozen, x[0])
        print(
            f"width {width:4d}, rank {rank:3d}: {times[-1]:8.3f} s, forward pass {forward:.4f} s, "
            f"relative squared error {error:.0e}"
        )
    steps = zip(pairwise(chosen.widths), pairwise(times), strict=True)
    growth = [f"{log(after / t) / log(wide / w):.1f}" for (w, wide), (t, after) in steps]
    print(f"growth: width to the power of {', then '.join(growth)}")


if __name__ == "__main__":
    main()
