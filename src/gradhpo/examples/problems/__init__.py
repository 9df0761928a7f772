"""Seven problems as users have them, each a file with `task(seed)` for `gradhpo tune`; the page
`docs/what_to_tune.md` has what tuning gives."""
