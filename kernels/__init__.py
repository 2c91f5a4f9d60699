"""The operations of a decoding step, imported as `stagedspec.kernels`.

This file imports nothing: libraries that probe for a module named `kernels` find it when Python runs in the
repository's root.
"""
