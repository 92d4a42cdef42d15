"""Names in the work directory of a training, which ``session.py`` describes."""

SETTINGS = "settings.json"
START = "start"
CHECKPOINTS = "checkpoints"
METRICS = "metrics.jsonl"
TENSORBOARD = "tensorboard"
