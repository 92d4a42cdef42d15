"""Training with fake quantization: what four bits take, got back before the export."""
