"""Short programs that a user would copy."""
