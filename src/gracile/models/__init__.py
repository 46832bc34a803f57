"""Networks: the zoo, and how a model specification on the command line becomes a module."""
