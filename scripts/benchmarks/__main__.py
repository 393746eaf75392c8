"""`python -m scripts.benchmarks`, which is what scripts/bench runs."""

import sys

from scripts.benchmarks.command import main

sys.exit(main(sys.argv[1:]))
