"""gRPC: the calls of Triton's and KServe's clients, each translated into a request of the HTTP API.

With `--grpc-port` the server starts one process, the gateway, by exec: gRPC and fork deadlock. Each call
becomes an HTTP request over a UNIX socket in the data directory, so the server checks tokens, limits and
roles as it does for HTTP, and a crash of the gateway costs only the calls in it.

- `app`: the server's side: the socket, the process, its restarts and its end; `gatewaywire`: for both sides
- `gateway`: the process: starts gRPC's server, announces its port, drains and exits
- `calls`: a call from its first byte to its last: limits, forwarding, errors
- `translation`: each method's request and answer, as HTTP and as messages
- `inference`: the method ModelInfer; `contents`: its typed tensors; `wireformat`: protobuf's encoding
- `messages`: the other messages, from `open_inference.proto` and `health.proto`
- `memory`: the memory for messages, and the calls that wait for it; `errors`: the status of each error
"""
