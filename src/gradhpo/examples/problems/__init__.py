"""Seven problems."""
