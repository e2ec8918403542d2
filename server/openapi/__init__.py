"""The OpenAPI 3.0.3 document, which the server serves and `make generated` writes to openapi.yaml.

    document.py      routes -> document: parameters, bodies, responses, errors, access; its text in YAML
    components.py    schemas of answers; what several operations have, as components
    examples.json    requests and answers of the operations that people try first, as a server gave them

The first two give each operation whole; a component only shortens the text.
"""
