"""What GPUs can do, per GPU, from their vendor's data sheets; dense figures, without sparsity.

| gpu  | source                                                                                                              |
|------|---------------------------------------------------------------------------------------------------------------------|
| a100 | NVIDIA A100 80GB (SXM) data sheet: 312 TF bf16, 19.5 TF fp32, 2,039 GB/s, NVLink 600 GB/s. DGX A100: 8 x 200 Gb/s      |
| h100 | NVIDIA H100 (SXM5) data sheet: 989 TF bf16, 67 TF fp32, 3.35 TB/s, NVLink 900 GB/s. DGX H100: 8 x 400 Gb/s             |
| h200 | NVIDIA H200 (SXM) data sheet: as H100 with 141 GB at 4.8 TB/s. DGX H200: 8 x 400 Gb/s                                  |
| b200 | NVIDIA Blackwell architecture brief, HGX B200: 2,250 TF bf16, 80 TF fp32, 180 GB at 8 TB/s, NVLink 1.8 TB/s; 8 x 400 Gb/s |

Streaming multiprocessors: A100 108, H100 and H200 132, from NVIDIA's white papers on Ampere and Hopper; B200 148, 74 on each of two dies,
as CUDA reports them. NVLink figures there count both directions; here one. Memory is in decimal gigabytes, as sold.
"""

from dataclasses import dataclass

from hope_pt.errors import ConfigError


@dataclass(frozen=True)
class GPU:
    """One GPU in a node of `per_node`. FLOP/s of bf16 matrix products and of fp32 ones, bytes, bytes/s; links in one direction.

    multiprocessors: programs of a kernel that run at once, if each fills one.
    """

    name: str
    bf16: float
    fp32: float
    memory: float
    bandwidth: float
    nvlink: float
    network: float
    multiprocessors: int
    per_node: int = 8


GPUS = {
    gpu.name: gpu
    for gpu in (
        GPU("a100", bf16=312e12, fp32=19.5e12, memory=80e9, bandwidth=2.039e12, nvlink=300e9, network=25e9, multiprocessors=108),
        GPU("h100", bf16=989e12, fp32=67e12, memory=80e9, bandwidth=3.35e12, nvlink=450e9, network=50e9, multiprocessors=132),
        GPU("h200", bf16=989e12, fp32=67e12, memory=141e9, bandwidth=4.8e12, nvlink=450e9, network=50e9, multiprocessors=132),
        GPU("b200", bf16=2250e12, fp32=80e12, memory=180e9, bandwidth=8e12, nvlink=900e9, network=50e9, multiprocessors=148),
    )
}

RESERVED = 3e9
"""Bytes of a GPU that are not ours: the CUDA context, the libraries' workspaces, NCCL's buffers. An assumption."""
USABLE = 0.92
"""Share of the rest that tensors fill before the allocator fragments. An assumption."""


def gpu_of(name: str) -> GPU:
    """The GPU called `name`; ConfigError names the known ones."""
    if name not in GPUS:
        raise ConfigError(f"--gpu {name}: unknown; expected one of {', '.join(GPUS)}")
    return GPUS[name]


def budget(gpu: GPU) -> float:
    """Bytes of tensors that fit."""
    return USABLE * (gpu.memory - RESERVED)
