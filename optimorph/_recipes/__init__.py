"""Floor 5: each optimizer is a short chain of transforms."""
