"""Denoisers: the transformer, its attention, and weights in published layouts."""
