"""Short scripts to read first; each runs as `python -m gradhpo.examples.NAME`."""
