"""Making the predictor: record full training runs, label them by CKA, fit, and judge on what was held out."""
