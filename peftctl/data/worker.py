"""A process that encodes rows for another: it reads a job and then batches of rows, and answers each with a chunk.

It ends when its input does, so it never outlives the process that started it.
"""

from __future__ import annotations

import json
import signal
import sys

from peftctl.data.encoding import LENGTH, encode, given_of, job_of


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever started it decides
    source, target = sys.stdin.buffer, sys.stdout.buffer
    job = job_of(json.loads(source.readline()))
    while line := source.readline():
        answer = encode(job, given_of(line)).dump()
        target.write(len(answer).to_bytes(LENGTH, "little") + answer)
        target.flush()
