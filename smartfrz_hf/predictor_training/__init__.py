"""Training the predictor: record full training runs, label them, fit, and evaluate on held-out model families and data."""
