"""Text in: local files and hub data sets, for calibration and evaluation alike."""
