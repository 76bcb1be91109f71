"""A build handed over to a cluster: how it is packed, followed and stopped."""
