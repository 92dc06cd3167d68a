#!/usr/bin/env bash
# Makes a CUDA 13.0 toolkit folder out of pip wheels, enough to build the feature `cuda` on a machine with neither a
# GPU nor a toolkit:
#
#   scripts/cuda-toolkit.sh FOLDER
#
# FOLDER/wheels gets the unpacked wheels (1.2 GB; the download is about 0.7 GB), FOLDER/toolkit the usual layout as links:
# bin, include, nvvm, lib64 with unversioned library names, and lib64/stubs/libcuda.so, an empty stand-in for the
# driver's library, made from the names in cuda.h. The stub serves the linker only; a machine with a driver has the real
# one. A second run keeps what is there. At the end the script prints what to export and the command that builds.
#
# The wheels are NVIDIA's and under NVIDIA's licence. Needs Linux on x86_64, gcc, Python 3 with pip. Environment: PYTHON
# (python3), CUDA_COMPUTE_CAP (90; what to print).
set -euo pipefail

folder=${1:?usage: cuda-toolkit.sh FOLDER (made if missing)}
python=${PYTHON:-python3}
capability=${CUDA_COMPUTE_CAP:-90}
wheels=(
    nvidia-cuda-nvcc==13.0.88
    nvidia-cuda-crt==13.0.88
    nvidia-nvvm==13.0.88
    nvidia-cuda-runtime==13.0.96
    nvidia-cuda-cccl==13.0.85
    nvidia-cuda-nvrtc==13.0.88
    nvidia-cublas==13.1.0.3
    nvidia-curand==10.4.0.35
)

fail() {
    echo "cuda-toolkit.sh: $*" >&2
    exit 1
}

[[ $(uname -sm) == "Linux x86_64" ]] || fail "found $(uname -sm), expected Linux x86_64"
for tool in "$python" gcc; do
    command -v "$tool" >/dev/null || fail "$tool not found; install it first"
done
"$python" -m pip --version >/dev/null || fail "$python has no pip; install it first"

mkdir -p "$folder"
folder=$(cd "$folder" && pwd)
stamp=$folder/wheels/installed
if [[ ! -f $stamp || $(<"$stamp") != "${wheels[*]}" ]]; then
    rm -rf "$folder/wheels" "$folder/wheels.new"
    "$python" -m pip install --disable-pip-version-check --no-cache-dir --no-deps --only-binary :all: \
        --target "$folder/wheels.new" "${wheels[@]}"
    echo "${wheels[*]}" >"$folder/wheels.new/installed"
    mv "$folder/wheels.new" "$folder/wheels"
fi
root=$folder/wheels/nvidia/cu13
for part in bin include lib nvvm; do
    [[ -d $root/$part ]] || fail "$root/$part is missing: the wheels are laid out otherwise than expected"
done

toolkit=$folder/toolkit
rm -rf "$toolkit"
mkdir -p "$toolkit/lib64/stubs"
for part in bin include nvvm; do
    ln -s "$root/$part" "$toolkit/$part"
done
# Unpacked by pip, programs may lack the right to run.
find "$root/bin" "$root/nvvm/bin" -type f -exec chmod +x {} +

# libcublas.so.13 is also wanted as libcublas.so, libfoo.so.1.2 as libfoo.so.1 and libfoo.so.
for path in "$root"/lib/*.so* "$root"/lib/*.a; do
    [[ -e $path ]] || continue
    name=${path##*/}
    ln -sf "$path" "$toolkit/lib64/$name"
    while [[ $name == *.so.* ]]; do
        name=${name%.*}
        [[ -e $toolkit/lib64/$name ]] || ln -s "$path" "$toolkit/lib64/$name"
    done
done
ln -s lib64 "$toolkit/lib"

# Every cu* name that cuda.h declares, also those its macros rename (cuMemAlloc_v2), as an empty function.
source=$(mktemp --suffix=.c)
trap 'rm -f "$source"' EXIT
grep -oE '\bcu[A-Z][A-Za-z0-9_]*\b' "$root/include/cuda.h" | sort -u | sed 's/.*/void &(void) {}/' >"$source"
count=$(wc -l <"$source")
((count > 300)) || fail "$root/include/cuda.h names $count functions, expected more than 300"
gcc -shared -fPIC -w -Wl,-soname,libcuda.so.1 -o "$toolkit/lib64/stubs/libcuda.so" "$source"
ln -s libcuda.so "$toolkit/lib64/stubs/libcuda.so.1"

for library in cublas cublasLt curand nvrtc cudart; do
    [[ -e $toolkit/lib64/lib$library.so ]] || fail "lib$library.so is missing from the wheels"
done
"$toolkit/bin/nvcc" --version >/dev/null || fail "$toolkit/bin/nvcc does not run"

cat <<END
The toolkit is in $toolkit. Build with:

export CUDA_PATH="$toolkit" CUDA_ROOT="$toolkit" CUDA_HOME="$toolkit"
export CUDA_COMPUTE_CAP=$capability
export PATH="$toolkit/bin:\$PATH"
export LIBRARY_PATH="$toolkit/lib64:$toolkit/lib64/stubs\${LIBRARY_PATH:+:\$LIBRARY_PATH}"
cargo build --release --features cuda

The first build takes about 10 minutes on 2 cores. The program needs the CUDA 13 libraries and a driver where it runs; if
the loader does not find them, name their folder in LD_LIBRARY_PATH (for instance /usr/local/cuda/lib64).
END
