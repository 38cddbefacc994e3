"""Floor 4: train real models on real data with several optimizers and show who wins, at what price."""
