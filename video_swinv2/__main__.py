"""`python -m video_swinv2`: what torchrun, deepspeed and srun start."""

import sys

from video_swinv2.cli import main

sys.exit(main())
