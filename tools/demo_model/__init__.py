"""Makes the small chat model that the package ships: `python -m tools.demo_model`."""
