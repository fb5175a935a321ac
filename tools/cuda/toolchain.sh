#!/usr/bin/env bash
# A CUDA 13.0 toolkit out of PyPI wheels, for machines that have none. Usage: toolchain.sh DEST [nvrtc] [libs] [cudnn] [nccl]
#   (nothing)  nvcc, ptxas, cicc, headers, cudart: all that `cargo build --features cuda` needs, 105 MB
#   nvrtc      + libnvrtc: kernels compiled at run time
#   libs       + libcublas, libcublasLt, libcurand: to run on a GPU machine that lacks them
#   cudnn nccl + the real ones, to run
# Then `. DEST/env.sh`. DEST/lib holds no CUDA *.so: `-lcuda -lcublas ...` find the lazy archives of mklazy.py and `-lcudart`
# the static runtime, so that the program starts on machines without CUDA as well. It can be run again: one stamp a wheel.
# Needs python3 with pip (installed where apt-get and root allow it), gcc, and cudarc's source (`cargo fetch`). x86-64 Linux.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
dest=${1:?usage: toolchain.sh DEST [nvrtc] [libs] [cudnn] [nccl]}
shift
python=${PYTHON:-python3}
mkdir -p "$dest/.stamps"
dest=$(cd "$dest" && pwd)

wheels=(nvidia-cuda-nvcc==13.0.88 nvidia-nvvm==13.0.88 nvidia-cuda-crt==13.0.88 nvidia-cuda-cccl==13.0.85 nvidia-cuda-runtime==13.0.96)
for part; do
  case $part in
    nvrtc) wheels+=(nvidia-cuda-nvrtc==13.0.88) ;;
    libs) wheels+=(nvidia-cublas==13.1.0.3 nvidia-curand==10.4.0.35) ;;
    cudnn) wheels+=(nvidia-cudnn-cu13==9.21.1.3) ;;
    nccl) wheels+=(nvidia-nccl-cu13==2.30.7) ;;
    *) echo "toolchain.sh: unknown part $part" >&2; exit 2 ;;
  esac
done

has_pip() { "$python" -m pip --version > /dev/null 2>&1; }
if ! has_pip; then
  if [ -z "${PYTHON:-}" ] && command -v apt-get > /dev/null && [ "$(id -u)" -eq 0 ]; then
    echo "toolchain.sh: installing python3 python3-pip" >&2
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends -qq python3 python3-pip > /dev/null
  fi
  has_pip || { echo "toolchain.sh: $python has no pip. Run: sudo apt-get install -y --no-install-recommends python3 python3-pip" >&2; exit 1; }
fi

missing=()
for wheel in "${wheels[@]}"; do
  [ -e "$dest/.stamps/$wheel" ] || missing+=("$wheel")
done
if [ ${#missing[@]} -gt 0 ]; then
  unpacked=$(mktemp -d "$dest/.pip.XXXX")
  trap 'rm -rf "$unpacked"' EXIT
  "$python" -m pip install --quiet --disable-pip-version-check --root-user-action ignore --no-deps --no-compile \
    --only-binary :all: --target "$unpacked" "${missing[@]}"
  for folder in cu13 cudnn nccl; do
    if [ -d "$unpacked/nvidia/$folder" ]; then cp -al "$unpacked/nvidia/$folder/." "$dest"/; fi
  done
  for wheel in "${missing[@]}"; do touch "$dest/.stamps/$wheel"; done
fi
rm -f "$dest"/lib/libnvrtc*.alt.so* "$dest"/lib/libnvvm.so* # 177 MB that nothing here uses
ln -sfn lib "$dest/lib64"
ln -sfn libcudart_static.a "$dest/lib/libcudart.a"

cudarc=${CUDARC_SRC:-$(find "${CARGO_HOME:-$HOME/.cargo}/registry/src" -maxdepth 2 -name 'cudarc-0.*' | sort -V | tail -1)}
[ -d "$cudarc/src/driver" ] || { echo "toolchain.sh: no source of cudarc found: run cargo fetch, or set CUDARC_SRC" >&2; exit 1; }
"$python" "$here/mklazy.py" "$cudarc" "$dest/lib" > /dev/null
cat > "$dest/env.sh" <<X
export CUDA_HOME=$dest CUDA_PATH=$dest REAL_NVCC=$dest/bin/nvcc NVCC=$here/nvcc-lite CUDARC_CUDA_VERSION=13000
export CUDA_COMPUTE_CAP=\${CUDA_COMPUTE_CAP:-90}
X
"$dest/bin/nvcc" --version | tail -1
