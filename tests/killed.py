"""A sweep of real trainings, in a process of its own that tests kill.

Importing it compiles what these need, so that processes forked from one that has it begin at once.
"""

from __future__ import annotations

from multiprocessing.connection import Connection
from pathlib import Path

import pandas as pd
import torch

from lorapower.experiments import sweeps, synthetic
from lorapower.experiments.study import Lora
from lorapower.experiments.sweeps import grid

# Seventy-two, in eighteen batches.
TRAININGS = grid(
    synthetic.Setting,
    problem=grid(synthetic.Problem, width=5, steps=100, every=4, samples=64, seed=range(6)),
    method=grid(Lora, ranks=range(1, 5), learning_rate=[1e-1, 1e-2, 1e-3]),
)


def run(path: Path | None, channel: Connection | None = None) -> pd.DataFrame:
    """The table; what is said through ``channel`` is when it starts."""
    # What forks must not have started threads, and numbers must not depend on how many there are.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        if channel:
            channel.send("started")
        return sweeps.run(TRAININGS, synthetic.measure, path, size=4, progress=False)
    finally:
        torch.set_num_threads(threads)


run(None)
