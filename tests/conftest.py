"""What holds for all tests."""

from hypothesis import settings
from support.events import PLAIN

settings.register_profile("loadledger", PLAIN)
settings.load_profile("loadledger")
