"""The transports of requests: `blocking` over sockets, `asynchronous` over aiohttp.

Both keep connections alive, read an answer within limits of time and size into one buffer, and send large
tensors from their own memory. http1.py writes and reads HTTP/1.1 for the blocking one, without any I/O.

`nodes` stands before both: it chooses among several servers, and the nodes behind them.
"""
