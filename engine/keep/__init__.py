"""Keeping what was not to change: masks, the region change mask, and what is put back at the end."""
