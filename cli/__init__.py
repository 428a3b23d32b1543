"""The command `ranvier`."""
