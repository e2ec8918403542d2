# The server and nothing else. It runs as 10001, without capabilities, on a root file system that it cannot
# write to; what it keeps is in /data, and models are read from /models. How to run it: docs/deployment.md.
#
# For builds that come out the same, pin the base by digest:
#   docker build --build-arg PYTHON=python:3.13-slim-bookworm@sha256:… .
ARG PYTHON=python:3.13-slim-bookworm

FROM ${PYTHON} AS wheel
WORKDIR /source
COPY setup.py pyproject.toml README.md LICENSE ./
COPY answers answers
COPY events events
COPY examples examples
COPY features features
COPY loadledger loadledger
COPY migrations migrations
COPY nodes nodes
COPY runtime runtime
COPY server server
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheel .

FROM ${PYTHON} AS installed
COPY --from=wheel /wheel /wheel
# What is compiled here need not be compiled at each start, where nothing can be written.
RUN python -m venv --without-pip /opt/loadledger \
    && pip --python /opt/loadledger/bin/python install --no-cache-dir --compile \
    "$(echo /wheel/loadledger-*.whl)[grpc,postgres]"

FROM ${PYTHON}
LABEL org.opencontainers.image.title="loadledger" \
      org.opencontainers.image.description="Loads and unloads ONNX models over HTTP, a process for each, with a ledger of who did what" \
      org.opencontainers.image.licenses="Apache-2.0 AND MIT"
# A number, so that Kubernetes can see that it is not root. New volumes take over who owns /data, and its mode.
RUN groupadd --gid 10001 loadledger \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /nonexistent --shell /usr/sbin/nologin loadledger \
    && install --directory --owner=10001 --group=10001 --mode=0700 /data \
    && install --directory /models
COPY --from=installed /opt/loadledger /opt/loadledger
COPY deploy/healthcheck.py /opt/loadledger/healthcheck.py
ENV PATH=/opt/loadledger/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    LOADLEDGER_HOST=0.0.0.0 \
    LOADLEDGER_PORT=8080 \
    LOADLEDGER_REPOSITORY=/models \
    LOADLEDGER_DATA=/data
USER 10001:10001
WORKDIR /
VOLUME ["/data", "/models"]
EXPOSE 8080
# The server is process 1: it handles SIGTERM, and removes the workers that become its children.
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=300s --retries=3 \
    CMD ["python", "/opt/loadledger/healthcheck.py"]
ENTRYPOINT ["loadledger"]
CMD ["serve"]
