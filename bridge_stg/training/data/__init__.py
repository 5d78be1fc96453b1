"""What a training run sees: items, batches, streams."""
