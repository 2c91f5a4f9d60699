"""State of a generation, on the host (host.py) or the device (device.py): committed sequences, trees, KV moves."""
