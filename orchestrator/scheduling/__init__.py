"""Driving a plan: what starts when and where, and what is committed."""
