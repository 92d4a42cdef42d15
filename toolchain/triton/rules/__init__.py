"""Rules of the repository lint, one file for each subject; ``lint.py`` of the room calls them."""
