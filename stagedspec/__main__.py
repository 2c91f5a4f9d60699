"""`python -m stagedspec`."""

from stagedspec.cli import app

app()
