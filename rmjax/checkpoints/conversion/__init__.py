"""From one format of weights to another, slice by slice."""
