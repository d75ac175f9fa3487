"""A small trained BatchNorm network and real handwritten digits, so that examples run out of the box."""
