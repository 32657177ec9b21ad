"""Runs a compilation by nvcc, and fails where ptxas says that a kernel loses what it was written for.

    python ptxas_gate.py nvcc -c kernel.cu -o kernel.o

ptxas says so in lines of kind "info", which neither `-Werror` nor a warning level reaches: C7508 that it ignores
setmaxnreg; C7510, C7511, C7514, C7515 that it serialises wgmma; C7517, C7519 that it puts waits in between. CMake runs
every compilation of CUDA by it.
"""

import re
import subprocess
import sys
from pathlib import Path

SAID = re.compile(r"\(C75\d\d\)")  # all that ptxas says about wgmma and setmaxnreg


def main(command: "list[str]") -> int:
    result = subprocess.run(command, stderr=subprocess.PIPE, text=True, errors="replace")
    sys.stderr.write(result.stderr)
    said = sorted({line.strip() for line in result.stderr.splitlines() if SAID.search(line)})
    if result.returncode or not said:
        return result.returncode
    print("error: ptxas serialises products that were written to overlap:", *said, sep="\n  ", file=sys.stderr)
    if "-o" in command:  # nothing is left that a next build would take for done
        Path(command[command.index("-o") + 1]).unlink(missing_ok=True)
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
