"""Early exit: easy inputs are answered before the network ends."""
