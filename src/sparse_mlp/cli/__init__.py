"""The command `sparse-mlp`: parses, calls the library, prints. One module a command."""
