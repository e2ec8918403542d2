"""The way of a load through the product is short."""

from tools.loadtrace import BESIDE, trace_loads

MOST_MODULES = 39
"""Of 50; a slow machine may add one."""


async def test_load_enters_few_modules() -> None:
    found = await trace_loads()
    del found[BESIDE]
    assert {"server/api/loads.py", "events/log.py"} <= set.intersection(*found.values())
    assert {load: len(modules) for load, modules in found.items() if len(modules) > MOST_MODULES} == {}
