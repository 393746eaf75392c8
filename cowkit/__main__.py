"""`python -m cowkit`: the `cowkit` command."""

import sys

from cowkit.cli.main import main

sys.exit(main())
