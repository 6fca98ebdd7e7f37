"""Run experiments: from settings to measured runs to one table.

Each kind of experiment is a module: `synthetic` (random networks), `residual` (transformers with
normalization), `digits` (networks on images). It has

- ``Problem``, a record that makes the frozen network, the target and the data, by its ``seed``;
- methods, records whose ``kind`` names them: those of `study`, or the module's own;
- ``Setting``, a record of a ``problem`` and a ``method``, which refuses pairs that do not fit;
- a record of results, what a run reaches: `synthetic.Errors`, `residual.Remainder`,
  `digits.Readings`;
- ``measure``, which takes settings of one problem and returns such a record for each.

`sweeps` runs any of them, ``sweeps.run(sweeps.grid(Setting, ...), measure, file)``, and keeps what
is finished. A new kind is a new module with these five.
"""

from ..errors import needs

# What the modules import besides the package's own dependencies.
with needs("book"):
    import pandas  # noqa: F401
    import pydantic  # noqa: F401
    import tqdm  # noqa: F401
