"""The command line, a file a command: demo, generate, fit-ngram, tune-tree, warm-up, tune, check, train.

The library does the work. `stagedspec.cli.app` is the Typer app.
"""

import sys

try:
    from stagedspec.cli.app import app
except KeyboardInterrupt:  # there is no command yet that would answer it
    print("\ninterrupted", file=sys.stderr)
    sys.exit(130)

__all__ = ["app"]
