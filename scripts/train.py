"""What `accelerate launch` and torchrun run: the same as `mygpt train`, in every process that they start.

accelerate launch scripts/train.py recipes/hardened.toml [flags]
"""

import sys

from mygpt.__main__ import main

if __name__ == "__main__":
    main(["train", *sys.argv[1:]])
