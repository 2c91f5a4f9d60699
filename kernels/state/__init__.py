"""A step's control state, on the host and on a device."""
