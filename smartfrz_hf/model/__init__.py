"""Models: their units, nested values, and patched forward passes."""
