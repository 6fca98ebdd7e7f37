"""What the study measured: settings → runs → one table, for each kind of experiment.

``sweeps`` runs and keeps any experiment; ``synthetic`` has the study's random networks, ``digits``
real images, ``encoders`` texts.
"""
