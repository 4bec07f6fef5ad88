"""Changing the matrices of a model, so that it can be undone."""
