"""Floor 2: one idea per file, its state beside it."""
