"""What writes the committed documentation from the code: `python -m tools.generate`. It is not shipped."""
