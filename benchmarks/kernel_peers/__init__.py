"""The kernels of the catalog as other systems compute them; `kernels.py --peers` times them, one process a system."""
