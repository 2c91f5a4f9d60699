"""Backends: what runs the operations of a step and holds the state of a generation. See interface.py."""
