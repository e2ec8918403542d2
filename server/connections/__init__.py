"""Connections, and what one may take: places, time, memory; TLS; and answers written past the framework."""
