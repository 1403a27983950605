"""A process that extracts again and again, each time in a child of its own to be killed.

Arguments: what to extract, and the options as JSON. For every line on its input, an output folder,
a tab and a number, it forks a child that extracts into it and prints the child's number; then it
waits for the child and prints how it ended. The child kills itself at its step of that number,
before it is done; 0 is none. The steps are what order the files of an output on the disk: every
fsync and every rename.

The fork saves the seconds that importing torch takes; no engine is made before it.
"""

import json
import os
import signal
import sys
import time

STEP = 0.02  # seconds more for each batch, so that there is time to be killed in


def die_at(step: int) -> None:
    """Has this process killed at the `step`-th call of what puts files on the disk."""
    calls = 0

    def counted(function):
        def call(*arguments, **named):
            nonlocal calls
            calls += 1
            if calls == step:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **named)

        return call

    os.fsync, os.rename, os.replace = map(counted, (os.fsync, os.rename, os.replace))


def extract(output: str, step: int) -> None:
    from engines import small_engine
    from extracting import Wrapped

    from stellar_fast.extract import make_job, run

    engine = small_engine()

    def encode(images, **arguments):
        time.sleep(0 if step else STEP)
        return engine.encode(images, **arguments)

    if step:
        die_at(step)
    if output.startswith("shelf://"):
        import shelf  # noqa: F401

    job = make_job(sys.argv[1], output, workers=1 if step else None, **json.loads(sys.argv[2]))
    run(job, Wrapped(engine, encode))


def main() -> None:
    # Not above: decoding processes import this file too, and do without torch.
    import engines  # noqa: F401
    import extracting  # noqa: F401

    for line in sys.stdin:
        output, step = line.rstrip("\n").split("\t")
        child = os.fork()
        if not child:
            sys.stdin.close()
            os.setsid()  # by which what it leaves behind is found
            extract(output, int(step))
            os._exit(0)
        print(child, flush=True)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    main()
