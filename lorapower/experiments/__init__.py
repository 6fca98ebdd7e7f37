"""The study's experiments: settings → runs → one table.

``synthetic`` adapts random networks, ``residual`` those with normalization, ``digits`` and
``coded`` networks on real images, ``encoders`` text encoders, with the ``texts`` and by
``protocols``. ``study`` has shared methods, ``sweeps`` runs all of them, ``pairs`` makes
checkpoints to plan adapters for.
"""
