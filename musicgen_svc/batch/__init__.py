"""A job of many rows: each row is one request, and all outputs go into one folder."""
