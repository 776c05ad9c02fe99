"""What is remembered between tasks, and how it is stored."""
