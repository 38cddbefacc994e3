"""Floor 2: which leaf is what, by its path and shape, never by its framework's classes."""
