"""Freezing the front of a model so that it costs nothing more."""
