"""What the study measured: settings → runs → one table, for each kind of experiment.

``synthetic`` has the study's random networks, ``residual`` those with normalization, ``digits`` and
``coded`` real images, ``encoders`` the ``texts``, whose runs ``protocols`` compares. ``study`` has
the methods that several of them share, and ``sweeps`` runs any of them. ``pairs`` makes checkpoints
to plan adapters for.
"""
