"""`python -m vq` is the `vq` command."""

import sys

from vq.cli import main

sys.exit(main())
