"""The report on an evaluation."""
