"""What a model is shown instead of the batch."""
