"""What the server shows of its work: log lines, traces and metrics.

A request gets a context (`output.begin_context`), which its log lines, its command and its job's lines share.

- `output`: the context, the formats of log lines, and the queue to stderr
- `requestlog`: a line and the counts of each request
- `eventlog`: a line of each event, read from the ledger after it was recorded
- `tracing`: spans of requests and jobs by OpenTelemetry; imported only if traces are exported
- `metrics`: the metrics, read from the application's state, and the route `/metrics`
- `timeseries`: samples of memory, requests and latencies of the last 24 hours, for charts

How events are worded is in `events.eventtext`. Metrics are listed in docs/metrics.md, which a test compares.
"""
