"""What the kernels share: registration, compiling, launch settings, timing."""
