"""The commands: thin layers of options, messages and files over the library."""
