"""The base of all answers, and the descriptions of their members.

A member without a default is in every answer, and null where there is no value. A member with a default is
missing where it has that value, and never null; but in a struct with `omit_defaults=False` all members are
always there. So a member that a later release adds has a default, and a client of that release reads the
answers of an earlier one. Clients ignore members that they do not know.
"""

from __future__ import annotations

from msgspec import Meta, Struct


class AnswerBody(Struct, frozen=True, omit_defaults=True):
    """The body of an answer, or a part of one."""


def about(text: str) -> Meta:
    """Describe a member."""
    return Meta(description=text)


def one_of(*values: str) -> Meta:
    """Document the values of a member; a client takes others, too, which a later release may have."""
    return Meta(extra_json_schema={"enum": list(values)})


def as_format(name: str) -> Meta:
    """Document the format of a text, by its name in OpenAPI."""
    return Meta(extra_json_schema={"format": name})


AS_OF = about("The position that the answer reflects.")
