"""Time to adapt many ReLU networks in one call, beside a Python loop over single ones.

    python benchmarks/adapt_batch.py [--networks 1000] [--width 16] [--depth 4] [--layers 2]

The loop's time is that of all networks, measured and not scaled up; the one call's is the least of
three. Both must agree. Then, for one call on one thread, where the time goes.
"""

from __future__ import annotations

import argparse
from time import perf_counter

import torch
from torch.profiler import ProfilerActivity, profile

from lorapower.bounds import fnn_threshold
from lorapower.constructions import adapt_relu
from lorapower.networks import FNN
from lorapower.regions import Ball

# Stages by the names of torch's own functions.
STAGES = {
    "singular value decompositions": ("svd",),
    "QR factorizations and solves": ("qr", "triangular"),
    "products of matrices": ("mm", "matmul"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", type=int, default=1000)
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--layers", type=int, default=2, help="of the targets")
    chosen = parser.parse_args()

    batch = (chosen.networks,)
    frozen = FNN.random(chosen.depth, chosen.width, batch_shape=batch, seed=1)
    target = FNN.random(chosen.layers, chosen.width, batch_shape=batch, seed=2)
    rank = int(fnn_threshold(frozen, target).max())
    region = Ball(2.0 * chosen.width**0.5)
    adapt_relu(frozen[:1], target[:1], rank, region)

    times = []
    for _ in range(3):
        start = perf_counter()
        together = adapt_relu(frozen, target, rank, region)
        times.append(perf_counter() - start)
    in_one_call = min(times)

    start = perf_counter()
    alone = [adapt_relu(frozen[k], target[k], rank, region) for k in range(chosen.networks)]
    in_a_loop = perf_counter() - start

    x = together.region.sample(100, edge=True)
    y = target(x)
    difference = together.adapters.merge(frozen)(x) - y
    worst = (difference.square().mean((-2, -1)) / y.square().mean((-2, -1))).max()
    lost = torch.stack([found.digits_lost for found in alone])
    differ = (lost - together.digits_lost).abs().amax(-1) > 0.01
    print(
        f"{chosen.networks} networks of width {chosen.width}, {chosen.depth} layers for "
        f"{chosen.layers}, rank {rank}, {torch.get_num_threads()} threads"
    )
    print(
        f"one call {in_one_call:.2f} s, loop {in_a_loop:.2f} s: {in_a_loop / in_one_call:.1f} times"
    )
    print(
        f"largest error relative to the signal {worst:.1e}; in {int(differ.sum())} networks "
        "rounding made the loop choose another splitting"
    )

    torch.set_num_threads(1)
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        start = perf_counter()
        adapt_relu(frozen, target, rank, region)
        whole = 1e6 * (perf_counter() - start)
    spent = {event.key: event.self_cpu_time_total for event in profiled.key_averages()}
    for stage, names in STAGES.items():
        mine = [key for key in spent if any(name in key for name in names)]
        print(f"{stage}: {sum(spent.pop(key) for key in mine) / whole:.0%}")
    print(f"all else in torch: {sum(spent.values()) / whole:.0%}")


if __name__ == "__main__":
    main()
