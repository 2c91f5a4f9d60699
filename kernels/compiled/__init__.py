"""A CPU's fast path in Numba: passes (`model.CompiledModel`), trees (`growth.Growth`) and noise (`noise.Noise`)."""
