"""Fitting a surrogate to a trunk, by its owner, on public text."""
