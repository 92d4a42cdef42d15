"""The report: one self-contained page of an engine, or of several side by side."""
