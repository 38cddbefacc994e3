"""Floor 0: types, trees, checks. Nothing here knows an optimizer."""
