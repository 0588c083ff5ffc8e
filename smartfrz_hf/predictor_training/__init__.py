"""Training the predictor: recording full training runs, labels, data set, fit and evaluation on held-out runs."""
