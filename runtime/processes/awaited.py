"""What a worker was asked once and has not answered: which answers it may give, and who waits for them."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import get_args

from runtime.errors import LoadRefused, PrepareCode
from runtime.wire import Loaded, LoadedFile, LoadFailed, PrepareDone, plain_text


@dataclass(frozen=True, slots=True)
class AwaitedLoad:
    """A load that has not been answered yet.

    Attributes:
        answer: who waits for it.
        on_stage: is told of each step.
        files: the paths that it was told to load.
        form: the SHA-256 of the prepared form that it was given.
    """

    answer: asyncio.Future[Loaded]
    on_stage: Callable[[str], None]
    files: tuple[str, ...]
    form: str | None

    def may_end_with(self, message: Loaded | LoadFailed) -> bool:
        """Tell whether a worker may say this: it names the files, and no others, that it was told to load."""
        if isinstance(message, LoadFailed):
            return message.code not in get_args(PrepareCode)
        return _paths(message.files) == self.files and message.prepared in {None, self.form}

    def settle(self, message: Loaded | LoadFailed) -> None:
        """Hand the answer to who waits for it, who may have gone."""
        if self.answer.done():
            return
        if isinstance(message, Loaded):
            self.answer.set_result(message)
        else:
            self.answer.set_exception(LoadRefused(message.code, plain_text(message.message)))


@dataclass(frozen=True, slots=True)
class AwaitedForm:
    """A form that has not been made yet.

    Attributes:
        answer: who waits for it.
        sources: the paths that it is to be made of.
    """

    answer: asyncio.Future[PrepareDone]
    sources: tuple[str, ...]

    def may_end_with(self, message: PrepareDone | LoadFailed) -> bool:
        """Tell whether a worker may say this: it names the sources, and no others, that it was told of."""
        return isinstance(message, LoadFailed) or _paths(message.sources) == self.sources

    def settle(self, message: PrepareDone | LoadFailed) -> None:
        """Hand the answer to who waits for it, who may have gone."""
        if self.answer.done():
            return
        if isinstance(message, PrepareDone):
            self.answer.set_result(message)
        else:
            self.answer.set_exception(LoadRefused(message.code, plain_text(message.message)))


def _paths(files: Sequence[LoadedFile]) -> tuple[str, ...]:
    return tuple(file.path for file in files)
