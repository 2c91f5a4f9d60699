"""Tuning for a machine, and comparing decoders on it."""
