"""From rated responses on disk to batches: sources, tokenise, pack, batches."""
