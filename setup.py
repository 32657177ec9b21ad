"""Has CMake build the native library where it can be built (CMakeLists.txt says how).

Without a C++ compiler or torch the package installs as Python only, without nvcc the library is built without CUDA
kernels, and one line says why. PEFT_KERNELS_NATIVE=0 never builds, =cpu builds no CUDA kernels, =1 fails where not all
can be built.
"""

import os
import re
import shutil
import subprocess
import sys
import time
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
OLDEST_TORCH = (2, 11)
REQUEST = os.environ.get("PEFT_KERNELS_NATIVE") or None
if REQUEST not in (None, "0", "1", "cpu"):
    raise SystemExit(f"expected PEFT_KERNELS_NATIVE of 0, 1 or cpu, got {REQUEST!r}")


def find_tool(name: str, *folders: str) -> "str | None":
    """A program, looked for beside this Python first: a venv need not be activated to build in it."""
    path = [os.path.dirname(sys.executable), os.environ.get("PATH", os.defpath), *folders]
    return shutil.which(name, path=os.pathsep.join(path))


def find_nvcc() -> "str | None":
    toolkit = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return os.environ.get("CUDACXX") or find_tool("nvcc", os.path.join(toolkit, "bin"))


def find_compiler() -> "str | None":
    return os.environ.get("CXX") or find_tool("c++") or find_tool("g++") or find_tool("clang++")


def why_not_native() -> "str | None":
    """The one reason why the native library is not built here, or None."""
    if REQUEST == "0":
        return "PEFT_KERNELS_NATIVE=0"
    if sys.platform != "linux":
        return f"expected Linux, got {sys.platform}"
    try:
        torch = metadata.version("torch")
    except metadata.PackageNotFoundError:
        return "torch is not installed beside setuptools (pip hides it without --no-build-isolation)"
    if tuple(int(part) for part in torch.split(".")[:2]) < OLDEST_TORCH:
        return f"expected torch >= {'.'.join(map(str, OLDEST_TORCH))}, got {torch}"
    missing = [tool for tool in ("cmake", "ninja") if find_tool(tool) is None]
    if find_compiler() is None:
        missing.append("a C++ compiler")
    if find_spec("pybind11") is None:
        missing.append("pybind11")
    return f"{', '.join(missing)} not found" if missing else None


def why_not_cuda() -> "str | None":
    """The one reason why the library is built without its CUDA kernels, or None."""
    if REQUEST == "cpu":
        return "PEFT_KERNELS_NATIVE=cpu"
    return None if find_nvcc() else "nvcc was not found (on PATH, in CUDA_HOME, in /usr/local/cuda)"


class BuildNative(build_ext):
    """`build_ext` that hands the whole build to CMake and installs it as `peft_kernels/_lib`."""

    def run(self) -> None:
        if not self.extensions:
            return
        started = time.monotonic()
        build, library = ROOT / self.build_temp, self._library_folder()
        missing = why_not_cuda()
        cuda = ["OFF"] if missing else ["ON", f"-DCMAKE_CUDA_COMPILER={find_nvcc()}"]
        configured = self._call(
            *(find_tool("cmake"), "-S", ROOT, "-B", build, "-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release"),
            *(f"-DPython_EXECUTABLE={sys.executable}", f"-DCMAKE_MAKE_PROGRAM={find_tool('ninja')}"),
            *(f"-DPEFT_KERNELS_CUDA={cuda[0]}", *cuda[1:]),
        )
        for note in re.findall(r"^-- (TORCH_CUDA_ARCH_LIST has .*)$", configured, flags=re.MULTILINE):
            print(f"peft_kernels: {note}", flush=True)
        self._call(find_tool("cmake"), "--build", build)
        self._call(find_tool("cmake"), "--install", build, "--prefix", library)
        (what,) = re.findall(r"^-- native library (for .*)$", configured, flags=re.MULTILINE)
        without = f", without CUDA kernels: {missing}" if missing else ""
        took = time.monotonic() - started
        print(f"peft_kernels: built the native library {what}{without} ({took:.0f} s)", flush=True)

    def get_outputs(self) -> "list[str]":
        return [str(path) for path in sorted(self._library_folder().glob("*.so"))]

    def get_output_mapping(self) -> "dict[str, str]":
        return {}  # an editable install builds in place: nothing is copied afterwards

    def _library_folder(self) -> Path:
        return (ROOT if self.inplace else (ROOT / self.build_lib)) / "peft_kernels" / "_lib"

    @staticmethod
    def _call(*command: object) -> str:
        """Run quietly, for what it prints; show that only where it fails."""
        words = [str(word) for word in command]
        result = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if result.returncode:
            print(result.stdout, file=sys.stderr, flush=True)
            raise SystemExit(
                f"peft_kernels: the native build failed: {' '.join(words)}\n"
                "(PEFT_KERNELS_NATIVE=cpu builds no CUDA kernels, =0 installs without the library)"
            )
        return result.stdout


reason = why_not_native()
incomplete = reason or why_not_cuda()
builds = {"build_ext", "bdist_wheel", "editable_wheel", "install", "build"} & set(sys.argv)
if incomplete and REQUEST == "1":
    raise SystemExit(f"PEFT_KERNELS_NATIVE=1: expected to build the whole native library, but {incomplete}")
if reason and builds:
    print(f"peft_kernels: Python only, without the native library: {reason}", flush=True)

setup(
    # A name only, which makes the wheel one of this platform: the sources are CMake's.
    ext_modules=[] if reason else [Extension("peft_kernels._lib._C", sources=[])],
    cmdclass={"build_ext": BuildNative},
)
