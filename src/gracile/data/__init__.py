"""Labelled images: where they come from, which rows are for what, and the batches made of them."""
