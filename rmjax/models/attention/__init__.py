"""Attention in packed rows, and the kernels that compute it."""
