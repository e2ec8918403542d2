"""Log lines and spans: what they say, how they are written, and where they go."""
