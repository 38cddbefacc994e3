"""Floor 8: train real models with several optimizers, and compare their losses and costs."""
