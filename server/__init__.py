"""Speaks HTTP: routes, authentication, errors, console. Only here is the web framework known."""
