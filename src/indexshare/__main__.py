"""`python -m indexshare`: the command line, for `torchrun -m indexshare train ...`."""

from indexshare.cli import main

if __name__ == "__main__":
    main()
