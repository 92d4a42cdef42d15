"""Tasks of lm-evaluation-harness on the local runtime. See README.md of this room."""
