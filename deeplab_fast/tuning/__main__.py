"""`python -m deeplab_fast.tuning PLAN.json OUTCOMES.jsonl [--progress]`: what
`deeplab_fast.tune` starts. People use `deeplab-fast tune`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from .api import plan_from, run_plan
from .tune import NoDevice


def main(argv: list[str]) -> int:
    """Carry out a plan; exit status 2 where there is no GPU, which the outcomes say."""
    plan = plan_from(json.loads(Path(argv[0]).read_text("utf-8")))
    try:
        run_plan(plan, Path(argv[1]), "--progress" in argv)
    except NoDevice:
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
