"""The `tunesmith` command: one file a command. Prints; decides nothing."""
