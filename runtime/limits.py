"""The limits after which a process or an unload counts as stuck, each with what happens then.

An unload without force takes at most the drain timeout, a measurement, the stop grace, a kill and the wait
for its exit; with force, only a kill and the wait for its exit.
"""

DRAIN_TIMEOUT_S = 30.0
"""Default of `drain_timeout_s`: running inferences of an unload end within it, or their worker is stopped."""
STOP_GRACE_S = 1.0
"""For a drained worker to exit by itself; then it is killed."""
INFERENCE_GRACE_S = 5.0
"""Default of `inference_grace_s`: a cancelled inference stops within it, or its worker is killed."""
MEASURE_LIMIT_S = 1.0
"""For a measurement of a worker. The kernel waits for the process's mappings, which a worker can hold; the
measurement is then given up, so that an unload does not wait for it."""
FORK_SERVER_LIMIT_S = 10.0
"""For a new fork server to import everything, which takes 0.2 s; then it is killed and launched again."""
FORK_LIMIT_S = 5.0
"""For a fork, which takes 4 ms; then the fork server is replaced, and its workers with it."""
EXIT_WAIT_S = 1.0
"""For the exit status and the last output of a worker that has exited; then they are unknown."""
