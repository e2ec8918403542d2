"""What runs in a worker's own process, and nowhere else: ONNX Runtime is imported here only."""
