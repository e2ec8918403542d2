"""Speaks HTTP: routes, authentication, errors, command line. Only here is the web framework known."""
