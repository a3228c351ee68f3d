"""Rows: where they come from, what they look like, which are kept. Imports nothing of the model."""
