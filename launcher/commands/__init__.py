"""What one can do with runs; each module is a command of the same name."""
