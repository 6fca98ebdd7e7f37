"""The study's experiments: settings → runs → one table.

``synthetic`` adapts random networks, ``residual`` those with normalization, ``noisy`` those seen
through noise, ``digits`` and ``coded`` networks on images. ``study`` has shared methods, ``sweeps``
runs all.
"""
