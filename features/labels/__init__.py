"""Labels: names for versions of a model, which persons set and remove."""
