"""The OpenAPI 3.0.3 document, which the server serves and `make generated` writes to openapi.yaml.

    document.py      routes -> document: parameters, bodies, responses, errors, access
    components.py    schemas of answers; what several operations have, as components
    examples.json    requests and answers of the operations that people try first, as a server gave them
    text.py          document -> YAML

The first two give each operation whole; a component only shortens the text.
"""
