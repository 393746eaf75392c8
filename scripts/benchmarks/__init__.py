"""What `scripts/bench` measures, and how. See docs/speed.md."""
