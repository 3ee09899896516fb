"""A policy that learns from its own samples: sampled, rewarded, and made a step of."""
