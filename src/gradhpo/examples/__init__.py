"""Short scripts to read first; `python -m gradhpo.examples.NAME` tunes once and prints the gain."""
