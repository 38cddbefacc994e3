"""The tasks of `optimorph race`: each file has a function `task`."""
