"""The named chat templates, one Jinja file each, written from the published formats of their models."""
