"""What is raced on: one file a task, each with a `task` function."""
