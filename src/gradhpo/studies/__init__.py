"""Studies: a module or a package each, with a frozen `Config` and `run(config) -> StudyResult`."""
