"""One generation: its request, its steps, what it calls and its statistics."""
