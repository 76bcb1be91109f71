"""Errors, digests, dtypes, paths and URLs, used by all other packages. Imports none of them."""
