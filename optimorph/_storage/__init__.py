"""Floor 4: optimizer state in fewer bytes."""
