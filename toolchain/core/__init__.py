"""Types, errors, hardware facts, manifests and atomic files. Standard library only; imports no other room."""
