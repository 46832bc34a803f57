"""Rank rules: each file says how large the factors of a layer should be."""
