from tests.pipeline.fake_cuda import fake_cuda
from tests.pipeline.host_kernel import host_kernels

__all__ = ["fake_cuda", "host_kernels"]
