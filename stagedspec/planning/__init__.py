"""Token trees: their settings, the cost model that chooses them, and adapting them to the text."""
