"""`python -m mygpt` and `accelerate launch -m mygpt`: the `mygpt` command."""

from mygpt.cli.main import main

if __name__ == "__main__":
    main()
