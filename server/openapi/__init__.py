"""The OpenAPI 3.0.3 document.

document.py      routes -> document: parameters, bodies, responses, errors, access
components.py    schemas of answers; what several operations have, as components
examples.py      requests and answers of the operations that people try first
text.py          document -> YAML
"""
