"""Chains of stages: ``engine`` (the whole picture) and ``build`` (an engine of an existing checkpoint)."""
