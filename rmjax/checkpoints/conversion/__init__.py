"""From one format of weights to another, chunk by chunk."""
