"""Measurements, one command each, with a table at the end."""
