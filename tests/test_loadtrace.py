"""The way of a load through the product is short."""

from tools.loadtrace import BESIDE, trace_loads

MOST_MODULES = 44
"""It is 42 or 43; on a slow machine something periodic may fall into a load."""


async def test_load_enters_few_modules() -> None:
    found = await trace_loads()
    del found[BESIDE]
    assert {"server/api/loads.py", "events/log.py"} <= set.intersection(*found.values())
    assert {load: len(modules) for load, modules in found.items() if len(modules) > MOST_MODULES} == {}
