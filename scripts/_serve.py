"""`scripts/serve`."""

import sys

from musicgen_svc.cli.serve import main

if __name__ == "__main__":
    sys.exit(main())
