"""Scores of conversations."""
