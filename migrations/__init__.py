"""The log's SQL schema: numbered files, each applied once, in one transaction, by `events.sqlite.schema`."""
