"""What the study measured: settings → runs → one table, for each kind of experiment.

``synthetic`` has the study's random networks, ``digits`` real images, ``encoders`` texts, and
``methods`` what adapts networks in the first two. ``sweeps`` runs any of them, by ``tables``, the
``store`` of finished runs, and ``provenance``, which knows the code that made these.
"""
