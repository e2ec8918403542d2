"""The prepared forms of models: what is kept of them, how they are made, and whether they are of use."""
