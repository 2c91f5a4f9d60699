"""The command line, a file a command: demo, generate, fit-ngram, tune-tree, warm-up, tune, check, train.

The library does the work. `stagedspec.cli.app` is the Typer app.
"""

from stagedspec.cli.app import app

__all__ = ["app"]
