"""Experiments, one file each: `config()` returns it, the docstring tells what to expect of it."""
