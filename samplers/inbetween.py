"""`python -m samplers.inbetween`: two keyframes and a prompt in, a video out; see `samplers.command`."""

import sys

if __name__ == "__main__":
    from samplers.command import main

    sys.exit(main())
