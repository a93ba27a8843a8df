"""Starts a run on hosts of AWS, prepares them, and leaves: `python -m launcher --config NAME`."""
