"""What runs the operations of a step: Triton kernels or torch."""
