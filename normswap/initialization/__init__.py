"""Initialize: give the new parts their values."""
