"""Entry point of `python -m video_swinv2`, the form in which torchrun, deepspeed and srun launch it."""

import sys

from video_swinv2.cli import main

sys.exit(main())
