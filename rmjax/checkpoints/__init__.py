"""Model files: read, written, checked."""
