"""`/metrics`: what is counted and measured, and how it is told to Prometheus."""
