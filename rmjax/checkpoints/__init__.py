"""Models on disk: opened, checked, read, written, converted."""
