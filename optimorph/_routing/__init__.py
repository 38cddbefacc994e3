"""Floor 2: rules for leaves by path and shape, for every framework alike."""
