"""Rewards for other programs' trainers: TRL, verl and Tunix."""
