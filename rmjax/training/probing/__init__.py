"""The head alone, on features computed once."""
