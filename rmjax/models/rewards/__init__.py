"""What a reward model's numbers mean."""
