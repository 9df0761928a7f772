"""Runs: many episodes, what looks on, and how they end early."""
