"""Floor 3: one idea per file, its state beside it."""
