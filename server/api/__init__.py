"""The management API: models, jobs, resources, and what their requests may ask for."""
