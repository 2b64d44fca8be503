"""Builds the CPU kernels (csrc/) beside vllm_kvcompress/attention/cpu.py; metadata is in pyproject.toml.

The library knows nothing of Python or torch: it is loaded with ctypes. Without a working compiler the
package installs all the same and falls back to torch, with a warning at run time. And one wheel per platform
serves every Python.
"""

import platform

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

COMMON = ["-std=c++17", "-O3", "-g0", "-fopenmp", "-fvisibility=hidden", "-ffp-contract=fast", "-Wno-psabi"]
SOURCES: dict[str, list[str]] = {"kernels": [], "select": [], "decode_portable": []}
if platform.machine().lower() in ("x86_64", "amd64"):
    COMMON.append("-DKVC_X86")
    # One file per instruction set, chosen at run time: the wheel runs on any x86-64.
    SOURCES["decode_avx2"] = ["-mavx2", "-mfma", "-mf16c"]
    SOURCES["decode_avx512"] = [
        *("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c"),
        *("-mprefer-vector-width=512", "-Wno-maybe-uninitialized", "-Wno-uninitialized"),
    ]


class BuildKernels(build_ext):
    """Compiles each source with its own flags into ``_kernels.so``, a name without Python's ABI tag."""

    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace(".", "/") + ".so"

    def build_extension(self, ext: Extension) -> None:
        objects: list[str] = []
        for source in ext.sources:
            flags = COMMON + SOURCES[source.removeprefix("csrc/").removesuffix(".cpp")]
            objects += self.compiler.compile(
                [source], self.build_temp, extra_postargs=flags, depends=ext.depends
            )
        path = self.get_ext_fullpath(ext.name)
        self.compiler.link_shared_object(objects, path, extra_postargs=["-fopenmp"], target_lang="c++")


class PlatformWheel(bdist_wheel):
    """Tagged ``py3-none-PLATFORM``: nothing in it is compiled against one Python."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(
    ext_modules=[
        Extension(
            "vllm_kvcompress.attention._kernels",
            sources=[f"csrc/{name}.cpp" for name in SOURCES],
            depends=[f"csrc/{name}" for name in ("abi.h", "simd.inl", "decode.inl")],
            optional=True,
        )
    ],
    cmdclass={"bdist_wheel": PlatformWheel, "build_ext": BuildKernels},
)
