"""Methods that put factors in the place of layers."""
