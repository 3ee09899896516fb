"""The decoder, its heads and its parameters."""
