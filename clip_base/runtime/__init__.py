"""What every other part stands on: reading and writing files, errors."""
