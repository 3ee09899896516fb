"""Scoring conversations and data sets with a trained model."""
