"""Models and tables: reading, checking, running them."""
