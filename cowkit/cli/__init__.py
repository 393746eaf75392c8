"""The `cowkit` command: thin glue."""
