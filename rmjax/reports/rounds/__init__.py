"""Pages that compare the rounds of an alignment."""
