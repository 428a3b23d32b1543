"""Lava Processes of our own. Lava executes every file of this folder: import-safe code only."""
