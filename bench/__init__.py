"""Measures the installed server against what it is made of, as ratios side by side: `python -m bench`."""
