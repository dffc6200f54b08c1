"""The commands of `fastsae`: each a file with `add_parser`, its flags, and `run`, what it does."""
