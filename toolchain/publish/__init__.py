"""Engines for other people: model card, bill of materials, upload. See README.md of this room."""
