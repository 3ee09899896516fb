"""Pages of runs in which a policy learns from its own samples."""
