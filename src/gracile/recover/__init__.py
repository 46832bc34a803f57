"""Recovery: what gets accuracy back without, or before, training."""
