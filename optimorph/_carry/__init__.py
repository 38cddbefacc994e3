"""Floor 5: what every array of a state is, and how a run continues with another optimizer."""
