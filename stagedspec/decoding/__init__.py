"""One generation: its request, steps, callbacks and statistics."""
