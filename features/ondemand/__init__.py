"""On-demand loads: an inference loads the model that it needs."""
