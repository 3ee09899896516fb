"""Programs compiled ahead of time: what they do, what they cost, and which mesh costs least."""
