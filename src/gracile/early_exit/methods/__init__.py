"""Methods of early exit."""
