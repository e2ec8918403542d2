"""Workers from outside: the processes, the fork server that they come from, and the wire to each."""
