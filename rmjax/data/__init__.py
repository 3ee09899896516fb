"""From rated responses and preference pairs on disk to batches of packed rows."""
