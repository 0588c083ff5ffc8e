"""What is observed of a run: weights, outputs of a few examples, learning rates."""
