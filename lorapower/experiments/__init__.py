"""Run experiments: from settings to measured runs to one table.

`study` has the frame: a `Setting` is a problem and a method, and `measure` takes settings of one
problem and returns what each reaches. `sweeps` runs and keeps them:
``sweeps.run(sweeps.grid(Setting, problem=..., method=...), measure, file)``.

Each kind of problem is a module: `synthetic` (random networks), `residual` (transformers with
normalization), `digits` (networks on images). A new kind is a module with a `study.Problem`, its
`study.Bench` and the record of its results.
"""

from ..errors import needs

# What the modules import besides the package's own dependencies.
with needs("book"):
    import pandas  # noqa: F401
    import pydantic  # noqa: F401
    import tqdm  # noqa: F401
