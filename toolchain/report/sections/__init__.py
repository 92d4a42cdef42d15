"""The sections of a report, one file each: ``section(files) -> Section``."""
