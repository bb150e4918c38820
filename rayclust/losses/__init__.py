"""Differentiable quantities shared by methods."""
