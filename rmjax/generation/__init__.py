"""Sampling from a language model."""
