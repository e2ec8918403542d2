"""Programs for maintainers: `python -m tools.generate` writes all generated documentation. Not shipped.

`loadtrace` prints the modules that a load enters, `mutants` (with `calltrace`) which changes of the product
no test notices. Each other module returns the text of one page: `commands`
docs/cli.md, `errors` and `events` docs/reference/, `settings` the table in docs/configuration.md, `pictures`
the SVG files of docs/images/ (with `drawing`); `generate` adds openapi.yaml. Tests compare the texts with the
committed files. `markdown` has the tables and anchors that the pages share.
"""
