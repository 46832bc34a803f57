"""Layers written as products of smaller ones: what stands for a layer, its weights, its ranks."""
