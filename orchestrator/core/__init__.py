"""What a build is: values and decisions. Standard library and pydantic only, no I/O."""
