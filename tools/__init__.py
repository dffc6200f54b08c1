"""What developers of this library run from a checkout; the wheel does not hold it, and the packages do not import it."""
