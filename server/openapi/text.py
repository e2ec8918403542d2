"""The text of the OpenAPI document: YAML in which a map or list that fits stands in one line."""

from __future__ import annotations

from io import StringIO
from typing import Any

import yaml

LINE_CHARACTERS = 110


class _Representer(yaml.SafeDumper):
    """Represents data without anchors."""

    def ignore_aliases(self, data: Any) -> bool:  # noqa: ARG002 -- the base class asks per value
        return True


_Serializer = getattr(yaml, "CSafeDumper", yaml.SafeDumper)
"""libyaml gives the same text as PyYAML in a fifth of the time."""


def to_yaml(document: dict[str, Any]) -> str:
    """Return the text of a document, in its order; the same document gives the same text."""
    part = _Representer(StringIO(), sort_keys=False).represent_data(document)
    assert isinstance(part, yaml.MappingNode)
    _choose_styles(part, 0, 0)
    text: str = yaml.serialize(part, Dumper=_Serializer, allow_unicode=True, width=LINE_CHARACTERS)
    return text


def _choose_styles(part: yaml.ScalarNode | yaml.CollectionNode, column: int, indent: int) -> None:
    """Let maps and lists stand in one line if they fit; of words alone, a map may take two, and a list more.

    Args:
        part: a map, a list, or a text.
        column: where it would begin in one line.
        indent: of the lines that it takes otherwise.
    """
    length = column + _count_characters(part)
    if isinstance(part, yaml.MappingNode):
        is_flat = all(isinstance(value, yaml.ScalarNode) for _, value in part.value)
        part.flow_style = length <= LINE_CHARACTERS or (is_flat and length <= 2 * LINE_CHARACTERS)
        for key, value in part.value:
            is_list = isinstance(value, yaml.SequenceNode)
            if key.value == "example" and isinstance(value, yaml.CollectionNode):
                value.flow_style = True  # it is JSON
                continue
            _choose_styles(value, indent + _count_characters(key) + 2, indent if is_list else indent + 2)
    elif isinstance(part, yaml.SequenceNode):
        is_words = all(isinstance(each, yaml.ScalarNode) for each in part.value)
        part.flow_style = is_words or length <= LINE_CHARACTERS
        for value in part.value:
            _choose_styles(value, indent + 2, indent + 2)


def _count_characters(part: yaml.ScalarNode | yaml.CollectionNode) -> int:
    """Return the length of a part's text in one line."""
    if isinstance(part, yaml.MappingNode):
        return sum(_count_characters(key) + _count_characters(value) + 4 for key, value in part.value)
    if isinstance(part, yaml.SequenceNode):
        return sum(_count_characters(each) + 2 for each in part.value)
    is_quoted = not str(part.value).replace("_", "").isalnum()
    return len(part.value) + 2 * is_quoted
