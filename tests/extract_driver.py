"""A process that extracts again and again, each time in a child of its own to be killed.

Arguments: the photographs. For every line on its input, an output folder, it forks a child that
extracts into it and prints the child's number; then it waits for the child and prints how it ended.
The fork saves the seconds that importing torch takes; no engine is made before it.
"""

import os
import sys
import time

STEP = 0.02  # seconds more for each batch, so that there is time to be killed in


def extract(output: str) -> None:
    from engines import small_engine
    from extracting import SMALL_PARTS, Wrapped

    from stellar_fast.extract import plan, run

    engine = small_engine()

    def encode(images, **arguments):
        time.sleep(STEP)
        return engine.encode(images, **arguments)

    run(plan(sys.argv[1], output, **SMALL_PARTS), Wrapped(engine, encode))


def main() -> None:
    # Not above: decoding processes import this file too, and do without torch.
    import engines  # noqa: F401
    import extracting  # noqa: F401

    for line in sys.stdin:
        child = os.fork()
        if not child:
            sys.stdin.close()
            extract(line.strip())
            os._exit(0)
        print(child, flush=True)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    main()
