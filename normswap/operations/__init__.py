"""One table of operations: what each does to a tensor's axes, values and channels, however a model writes it."""
