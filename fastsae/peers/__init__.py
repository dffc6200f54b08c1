"""Other libraries' sparse autoencoders."""
