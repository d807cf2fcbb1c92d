"""A classifier's process without a model: the text is its score, or what the process does."""

from __future__ import annotations

import json
import os
import signal
import sys
import time


def main() -> None:
    json.loads(sys.stdin.readline())
    if "refuse" in sys.argv:
        sys.exit(3)
    print(json.dumps({"ready": True}), flush=True)
    died = sys.argv[1] if len(sys.argv) > 1 else ""
    for line in sys.stdin:
        item = json.loads(line)
        text = item["text"]
        if died and not os.path.exists(died) and ("die" in text or "hang" in text):
            with open(died, "w"):
                pass
            if "die" in text:
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(60)
        if "always dies" in text:
            sys.exit(1)
        score = 0.9 if "unsafe" in text else 0.4 if "odd" in text else 0.1
        print(json.dumps({"id": item["id"], "score": score}), flush=True)


main()
