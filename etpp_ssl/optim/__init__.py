"""Parameter groups and the learning rate, each a pure function."""
