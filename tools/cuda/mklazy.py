#!/usr/bin/env python3
"""Static archives lib{cuda,cublas,...}.a whose functions open the real library at their first call. x86-64 Linux.

    mklazy.py CUDARC_SOURCE DESTINATION

candle links CUDA's libraries dynamically, and a program so linked doesn't start where they are missing. Linked against these
archives instead, it has no CUDA in its list of needed libraries, starts anywhere, and its first CUDA call returns an
error code where there is no driver. The names of the functions are read from cudarc's bindings.

Each function is a jump through a slot. An empty slot leads to `slow`, which keeps all argument registers, asks the C side
for the function by its index, and goes on there; stack arguments stay where they are.
"""

import pathlib
import re
import subprocess
import sys

# module of cudarc, archive, names to open, what every function returns when none can be opened
LIBRARIES = [
    ("driver", "cuda", ["libcuda.so.1", "libcuda.so"], 100),  # CUDA_ERROR_NO_DEVICE
    ("nvrtc", "nvrtc", ["libnvrtc.so.13", "libnvrtc.so"], 7),  # NVRTC_ERROR_BUILTIN_OPERATION_FAILURE
    ("cublas", "cublas", ["libcublas.so.13", "libcublas.so"], 1),  # CUBLAS_STATUS_NOT_INITIALIZED
    ("cublaslt", "cublasLt", ["libcublasLt.so.13", "libcublasLt.so"], 1),
    ("curand", "curand", ["libcurand.so.10", "libcurand.so"], 101),  # CURAND_STATUS_NOT_INITIALIZED
    ("nccl", "nccl", ["libnccl.so.2", "libnccl.so"], 2),  # ncclSystemError
    ("cudnn", "cudnn", ["libcudnn.so.9", "libcudnn.so"], 1001),  # CUDNN_STATUS_NOT_INITIALIZED
]


def resolver(prefix, names, libraries, code):
    """C: opens the library once, fills one slot, and answers `code` for whatever is missing."""
    strings = ",".join(f'"{name}"' for name in names)
    opens = " ".join(f'if (!library) library = dlopen("{name}", RTLD_NOW | RTLD_LOCAL);' for name in libraries)
    return f"""#define _GNU_SOURCE
#include <dlfcn.h>
#include <pthread.h>
void *{prefix}_slots[{len(names)}] __attribute__((visibility("hidden")));
static const char *const names[] = {{{strings}}};
static void *library;
static pthread_once_t once = PTHREAD_ONCE_INIT;
static int missing(void) {{ return {code}; }}
static void open_library(void) {{ {opens} }}
__attribute__((visibility("hidden"))) void *{prefix}_resolve(long index) {{
    pthread_once(&once, open_library);
    void *function = library ? dlsym(library, names[index]) : 0;
    if (!function) function = (void *)missing;
    __atomic_store_n(&{prefix}_slots[index], function, __ATOMIC_RELEASE);
    return function;
}}
"""


def entries(prefix, names):
    """Assembly: one entry a function, and the slow path, which keeps six integer and eight vector arguments and al."""
    saved = ["rdi", "rsi", "rdx", "rcx", "r8", "r9", "rax"]
    lines = [".text", f"{prefix}_slow:"]
    lines += [f"push %{register}" for register in saved] + ["sub $128,%rsp"]
    lines += [f"movups %xmm{i},{16 * i}(%rsp)" for i in range(8)]
    lines += ["mov 184(%rsp),%rdi", "push %rbp", "mov %rsp,%rbp", "and $-16,%rsp", f"call {prefix}_resolve"]
    lines += ["mov %rbp,%rsp", "pop %rbp", "mov %rax,%r11"]
    lines += [f"movups {16 * i}(%rsp),%xmm{i}" for i in range(8)] + ["add $128,%rsp"]
    lines += [f"pop %{register}" for register in reversed(saved)] + ["add $8,%rsp", "jmp *%r11"]
    for index, name in enumerate(names):
        lines += [f".globl {name}", f".type {name},@function", f"{name}: mov {prefix}_slots+{8 * index}(%rip),%r11"]
        lines += ["test %r11,%r11", "jz 1f", "jmp *%r11", f"1: pushq ${index}", f"jmp {prefix}_slow"]
    return "\n".join([*lines, '.section .note.GNU-stack,"",@progbits', ""])


def archive(cudarc, out, module, library, opened, code):
    """Writes one archive; returns how many functions it has."""
    bindings = (cudarc / "src" / module / "sys" / "mod.rs").read_text()
    names = sorted(set(re.findall(r"pub unsafe fn (\w+)", bindings)) - {"culib", "is_culib_present"})
    prefix, objects = f"lazy_{library}", []
    for suffix, text in ((".c", resolver(prefix, names, opened, code)), ("_entries.S", entries(prefix, names))):
        source = out / f"{library}{suffix}"
        source.write_text(text)
        objects.append(source.with_name(source.name + ".o"))
        subprocess.run(["gcc", "-O2", "-fPIC", "-c", source, "-o", objects[-1]], check=True)
        source.unlink()
    target = out / f"lib{library}.a"
    target.unlink(missing_ok=True)
    subprocess.run(["ar", "rcs", target, *objects], check=True)
    for one in objects:
        one.unlink()
    return len(names)


def main():
    cudarc, out = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2])
    out.mkdir(parents=True, exist_ok=True)
    for module, library, opened, code in LIBRARIES:
        print(f"lib{library}.a: {archive(cudarc, out, module, library, opened, code)} functions")


if __name__ == "__main__":
    main()
