"""Whole passes on a CPU, compiled by Numba: `model.CompiledModel`."""
