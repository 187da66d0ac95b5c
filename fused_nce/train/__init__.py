"""Training and evaluation of the models: one loop, one configuration, one checkpoint format."""
