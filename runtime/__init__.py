"""Runs models: repository, scheduler, consumer, workers. No HTTP; ONNX Runtime only in the workers."""
