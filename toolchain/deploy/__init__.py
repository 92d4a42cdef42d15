"""Where an engine runs that was built here: commands, Kubernetes manifests, the directory of a NIM."""
