"""Schemes: each file takes the weight of a layer apart into those of several."""
