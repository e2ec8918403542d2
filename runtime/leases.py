"""Which models inferences wait for: such a model is not unloaded by the system before they were answered."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager


class Leases:
    """Counts, by model, the inferences that wait for it or are being answered after they did."""

    def __init__(self) -> None:
        self._counts: dict[str, int] = {}
        self.on_end: Callable[[], None] = lambda: None
        """Is called when the last lease of a model has ended."""

    @contextmanager
    def hold(self, model_id: str) -> Iterator[None]:
        """Keep a model from being evicted or unloaded as idle meanwhile; it need not be loaded yet."""
        self._counts[model_id] = self._counts.get(model_id, 0) + 1
        try:
            yield
        finally:
            self._counts[model_id] -= 1
            if not self._counts[model_id]:
                del self._counts[model_id]
                self.on_end()

    def held(self, model_id: str) -> bool:
        """Whether anybody holds a lease of the model."""
        return model_id in self._counts

    @property
    def models(self) -> Collection[str]:
        """The models that somebody holds a lease of."""
        return self._counts.keys()
