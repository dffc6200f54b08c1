"""What every Triton kernel takes, compiled without a GPU: `python -m tools.kernel_report`."""
