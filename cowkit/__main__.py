"""`python -m cowkit`: the `cowkit` command."""

from cowkit.cli.main import command

command()
