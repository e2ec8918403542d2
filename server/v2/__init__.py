"""The Open Inference Protocol v2: inferences, what they wait for, metadata, and Triton's extensions."""
