"""What features add to a model of `events.models`."""

from features.nodes.copies import Servings

__all__ = ["Servings"]
