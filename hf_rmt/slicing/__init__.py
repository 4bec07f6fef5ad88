"""The residual stream in another basis, and with fewer dimensions."""
