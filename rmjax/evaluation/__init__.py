"""How good a reward model is: benchmarks, scores, statistics."""
