"""The expressive power of low-rank adaptation: constructions, bounds and networks, all batched."""
