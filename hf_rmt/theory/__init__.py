"""Tensors in, tensors out: the mathematics, without any model."""
