"""The command line: decodes options, joins spec, store and cluster, maps errors to exit codes."""
