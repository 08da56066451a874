"""`python -m sparse_mlp` is the command `sparse-mlp`; torchrun needs a module to start."""

from sparse_mlp.cli.main import main

if __name__ == "__main__":
    raise SystemExit(main())
