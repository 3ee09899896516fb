"""From data and weights to a trained reward model."""
