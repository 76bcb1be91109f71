"""What everything stands on: errors, digests, dtypes, paths, URLs without secrets. Imports nothing of ours."""
