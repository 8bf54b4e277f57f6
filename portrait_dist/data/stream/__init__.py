"""The exact stream: order of samples, dataset, loader."""
