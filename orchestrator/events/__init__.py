"""What a build reports while it runs: values, JSON lines, and back."""
