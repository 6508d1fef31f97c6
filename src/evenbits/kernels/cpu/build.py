"""Builds the CPU library from `csrc/`: what the install hook, the Makefile and a developer all run.

    python src/evenbits/kernels/cpu/build.py               writes libevenbits_cpu beside this file
    python src/evenbits/kernels/cpu/build.py --sanitize D  writes one with address and undefined-behaviour checks into D

One object per instruction set, each with its own flags, linked into one library without torch or Python headers; which
one runs is decided when it is loaded. Only the standard library is imported: at install there is no torch yet.
`CC` names the compiler (default: the first of cc, gcc, clang on the path).
"""

from __future__ import annotations

import argparse
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
SOURCES = HERE / "csrc"
_COMMON = ["-std=gnu11", "-O3", "-fPIC", "-ffp-contract=off", "-fno-math-errno", "-fvisibility=hidden"]
_COMMON += ["-fno-strict-aliasing"]  # totals are int32 or the bits of float32, whichever a product needs
_LINK = ["-shared", "-lpthread", "-ldl"]
_SANITIZE = ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]
_AVX2 = ["-mavx2", "-mfma", "-mf16c"]
_AVX512 = [*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512vnni", "-mprefer-vector-width=512"]
# Variant → flags, per processor; "portable" needs none. A compiler that does not know them leaves the variant out.
_VARIANTS = {
    "x86_64": {
        "amx": [*_AVX512, "-mavx512vbmi", "-mamx-tile", "-mamx-int8"],
        "avx512vnni": _AVX512,
        "avxvnni": [*_AVX2, "-mavxvnni"],
        "avx2": _AVX2,
    },
    "aarch64": {"neon": ["-march=armv8.2-a+dotprod"]},
}
_MACHINES = {"amd64": "x86_64", "arm64": "aarch64"}


class BuildError(RuntimeError):
    """No compiler, or it failed; the message says which and what it printed."""


def library_name() -> str:
    """The library's file name on this system."""
    return "libevenbits_cpu.dylib" if sys.platform == "darwin" else "libevenbits_cpu.so"


def source_hash() -> str:
    """Identifies the C sources and the flags; the library carries it, so that a stale one is noticed."""
    digest = hashlib.sha256(repr([_COMMON, _LINK, _VARIANTS]).encode())
    for path in sorted(SOURCES.iterdir()):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def compiler() -> list[str]:
    """The compiler command. Raises BuildError if there is none."""
    if named := os.environ.get("CC"):
        command = shlex.split(named)
        if shutil.which(command[0]) is None:
            raise BuildError(f"the compiler that CC names, {named!r}, was not found")
        return command
    for name in ("cc", "gcc", "clang"):
        if found := shutil.which(name):
            return [found]
    raise BuildError("no C compiler (cc, gcc or clang) was found")


def build(folder: Path = HERE, *, sanitize: bool = False) -> Path:
    """Compiles and links; returns the library's path. Raises BuildError; an older library stays as it is then."""
    if sys.platform not in ("linux", "darwin"):
        raise BuildError(f"the CPU kernels are built on Linux and macOS only, this is {sys.platform}")
    cc, machine = compiler(), platform.machine().lower()
    variants = _VARIANTS.get(_MACHINES.get(machine, machine), {})
    extra = _SANITIZE if sanitize else []
    with tempfile.TemporaryDirectory() as scratch:
        objects, found = [], []
        for name, flags in [("portable", []), *variants.items()]:
            target = Path(scratch, f"{name}.o")
            if name != "portable" and not _accepts(cc, flags, Path(scratch)):
                continue
            try:
                _run([*cc, *_COMMON, *extra, *flags, "-c", str(SOURCES / f"{name}.c"), "-o", str(target)])
            except BuildError as error:
                if name == "portable":
                    raise
                sys.stderr.write(f"evenbits: the library goes without the variant {name}: {error}\n")
                continue
            objects.append(str(target))
            found += [] if name == "portable" else [f"-DEB_HAVE_{name.upper()}"]
        for name in ("api", "threads"):
            target = Path(scratch, f"{name}.o")
            hashed = f"-DEB_SOURCE_HASH={source_hash()}"
            _run([*cc, *_COMMON, *extra, *found, hashed, "-c", str(SOURCES / f"{name}.c"), "-o", str(target)])
            objects.append(str(target))
        # Linked beside its final place and renamed: a process that has the old one loaded keeps it.
        fresh = folder / f".{library_name()}.{os.getpid()}"
        try:
            _run([*cc, *objects, *extra, *_LINK, "-o", str(fresh)])
            return fresh.replace(folder / library_name())
        finally:
            fresh.unlink(missing_ok=True)


def platform_tag() -> str:
    """The wheel tag of a library built here: any Python 3, this platform. A macOS Python for two processors builds for
    the one that it runs on."""
    here = sysconfig.get_platform().replace("universal2", platform.machine())
    return "py3-none-" + here.replace("-", "_").replace(".", "_")


def _accepts(cc: list[str], flags: list[str], scratch: Path) -> bool:
    empty = scratch / "empty.c"
    empty.write_text("int empty;\n", encoding="utf-8")
    command = [*cc, *flags, "-c", str(empty), "-o", str(scratch / "empty.o")]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise BuildError(f"{command[0]} could not be run: {error}") from error
    if done.returncode:
        raise BuildError(f"{shlex.join(command)} failed:\n{done.stderr}")


def main(arguments: list[str] | None = None) -> int:
    """The command line; 1 if the library could not be built."""
    parser = argparse.ArgumentParser(description="Build evenbits' CPU kernels.")
    parser.add_argument("--sanitize", type=Path, metavar="FOLDER", help="build with sanitizers into FOLDER")
    sanitize = parser.parse_args(arguments).sanitize
    try:
        path = build(sanitize or HERE, sanitize=sanitize is not None)
    except BuildError as error:
        sys.stderr.write(f"evenbits: {error}\nevenbits: without the library torch's own operations run, slower.\n")
        return 1
    sys.stderr.write(f"evenbits: built {path}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
