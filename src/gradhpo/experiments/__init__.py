"""Studies: one file each, with a frozen `Config` and `run(config) -> StudyResult`."""
