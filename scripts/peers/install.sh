#!/usr/bin/env bash
# Installs the programs Longspan is compared with into one virtualenv folder, for scripts/peers/run.py and
# scripts/parity: llama.cpp (built from source, its tools in FOLDER/bin), OpenVINO GenAI, PyTorch, transformers.
#
#   scripts/peers/install.sh FOLDER
#
# Packages come from whatever index pip is set up for. Environment: PYTHON (python3), LLAMA_CPP_PYTHON (version of the
# source distribution that holds llama.cpp), JOBS (2), LLAMA_ARCH (cmake switches for another processor).
#
# llama.cpp is built for AVX-512 machines with VNNI and BF16; AMX stays off because its AMX build crashes on some
# machines. On a processor without AVX-512 set LLAMA_ARCH="-DGGML_NATIVE=ON".
set -euo pipefail

folder=${1:?usage: install.sh FOLDER (a virtualenv, made if missing)}
python=${PYTHON:-python3}
version=${LLAMA_CPP_PYTHON:-0.3.36}
jobs=${JOBS:-2}
arch=${LLAMA_ARCH:--DGGML_NATIVE=OFF -DGGML_AVX=ON -DGGML_AVX2=ON -DGGML_FMA=ON -DGGML_F16C=ON -DGGML_BMI2=ON \
-DGGML_AVX512=ON -DGGML_AVX512_VBMI=ON -DGGML_AVX512_VNNI=ON -DGGML_AVX512_BF16=ON \
-DGGML_AMX_TILE=OFF -DGGML_AMX_INT8=OFF -DGGML_AMX_BF16=OFF}
common="-DCMAKE_BUILD_TYPE=Release $arch -DGGML_LLAMAFILE=ON -DGGML_OPENMP=ON \
-DLLAMA_CURL=OFF -DLLAMA_OPENSSL=OFF -DLLAMA_BUILD_UI=OFF -DLLAMA_USE_PREBUILT_UI=OFF"

for tool in "$python" c++ tar; do
    command -v "$tool" >/dev/null || { echo "install.sh: $tool not found; install it first" >&2; exit 1; }
done
if [[ ! -x $folder/bin/python ]]; then
    "$python" -m venv "$folder"
fi
folder=$(cd "$folder" && pwd)
pip=("$folder/bin/pip" --disable-pip-version-check)

# cmake is a wheel too, for machines without it.
if ! command -v cmake >/dev/null; then
    "${pip[@]}" install cmake
    PATH=$folder/bin:$PATH
fi
"${pip[@]}" install torch transformers accelerate safetensors gguf sentencepiece tokenizers numpy \
    openvino-genai openvino-tokenizers

# One source for the tools and the Python package, so that both are the same llama.cpp.
source=$folder/src
mkdir -p "$source"
archive=$source/llama_cpp_python-$version.tar.gz
if [[ ! -f $archive ]]; then
    "${pip[@]}" download --no-deps --no-binary llama-cpp-python -d "$source" "llama-cpp-python==$version"
fi
tree=$source/llama_cpp_python-$version
[[ -d $tree ]] || tar -xzf "$archive" -C "$source"

# Words of $common are separate arguments.
# shellcheck disable=SC2086
cmake -S "$tree/vendor/llama.cpp" -B "$source/build" $common -DBUILD_SHARED_LIBS=OFF \
    -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_APP=OFF
cmake --build "$source/build" -j "$jobs" --target llama-bench llama-perplexity llama-server
install -m 755 "$source"/build/bin/llama-{bench,perplexity,server} "$folder/bin/"

CMAKE_BUILD_PARALLEL_LEVEL=$jobs CMAKE_ARGS="$common -DLLAVA_BUILD=OFF" \
    "${pip[@]}" install --no-cache-dir "$archive"

"$folder/bin/python" - <<'CHECK'
import llama_cpp, openvino_genai, torch, transformers
print("llama-cpp-python", llama_cpp.__version__, "| openvino-genai", openvino_genai.__version__,
      "| torch", torch.__version__, "| transformers", transformers.__version__)
CHECK
"$folder/bin/llama-bench" --version
