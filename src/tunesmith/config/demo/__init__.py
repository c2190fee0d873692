"""The demo's run file and data, shipped inside the package."""
