"""cowkit server."""
