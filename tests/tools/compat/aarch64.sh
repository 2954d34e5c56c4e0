#!/usr/bin/env bash
# An emulated Jetson: Python 3.11 and torch 2.4.1 (the oldest of JetPack 6) for aarch64 on another Linux machine.
#
#   tests/tools/compat/aarch64.sh FOLDER [TORCH]
#
# makes FOLDER/python (minutes, 1 GB; apt-get, as root, on Debian or Ubuntu) and compiles lora_edge/_C of this checkout for it.
#
# The processor is a Cortex-A76, close to Orin's A78AE: no SVE and no bfloat16. On qemu's default, which has both, torch 2.4
# multiplies float32 matrices in bfloat16. Python and its libraries are Debian's arm64 packages, unpacked but not installed; torch
# and the rest are wheels from PyPI.
set -euo pipefail
checkout=$(cd "$(dirname "$0")/../../.." && pwd)
folder=$(mkdir -p "$1" && cd "$1" && pwd)
torch=${2:-2.4.1}

install_emulator() {
  if command -v qemu-aarch64-static aarch64-linux-gnu-g++ >/dev/null; then return; fi
  export DEBIAN_FRONTEND=noninteractive
  apt-get update -qq
  apt-get install -y -qq qemu-user-static g++-aarch64-linux-gnu >/dev/null
}

unpack_python() {
  mkdir -p "$folder"/{root,lists/partial,archives/partial}
  touch "$folder/lists/status"
  local arm64=(
    -o APT::Architecture=arm64 -o APT::Architectures=arm64 -o "Dir::State::Lists=$folder/lists"
    -o "Dir::State::status=$folder/lists/status" -o "Dir::Cache::archives=$folder/archives"
  )
  apt-get "${arm64[@]}" update -qq
  apt-get "${arm64[@]}" install -y -qq --download-only --no-install-recommends \
    python3.11 python3.11-dev libc6 libgomp1 libstdc++6 >/dev/null
  local package
  for package in "$folder"/archives/*.deb; do dpkg -x "$package" "$folder/root"; done
}

install_wheels() {
  local platforms=(manylinux2014_aarch64 manylinux_2_17_aarch64 manylinux_2_27_aarch64 manylinux_2_28_aarch64)
  # pip does not resolve dependencies for another machine, so all of them are named
  "${PYTHON:-python3}" -m pip install -q --disable-pip-version-check --no-deps --only-binary=:all: --upgrade \
    --target "$folder/site" --python-version 3.11 --implementation cp --abi cp311 --abi abi3 --abi none \
    "${platforms[@]/#/--platform=}" "$@"
}

write_python() {
  cat > "$folder/python" <<SCRIPT
#!/usr/bin/env bash
export PYTHONPATH="$folder/site\${PYTHONPATH:+:\$PYTHONPATH}" PYTHONDONTWRITEBYTECODE=1 OMP_NUM_THREADS="\${OMP_NUM_THREADS:-1}"
exec qemu-aarch64-static -cpu cortex-a76 -L "$folder/root" -E "LD_LIBRARY_PATH=$folder/site/torch.libs:$folder/site/numpy.libs" \\
  "$folder/root/usr/bin/python3.11" "\$@"
SCRIPT
  chmod +x "$folder/python"
}

build_extension() {
  cd "$checkout"
  aarch64-linux-gnu-g++ -std=c++17 -O3 -fPIC -shared -fvisibility=hidden -Icsrc -I"$folder/site/pybind11/include" \
    -I"$folder/root/usr/include/python3.11" -I"$folder/root/usr/include" csrc/module.cpp csrc/without_cuda.cpp csrc/cpu/*.cpp \
    -o lora_edge/_C.cpython-311-aarch64-linux-gnu.so -lpthread -ldl
}

if [[ ! -x "$folder/python" ]]; then
  install_emulator
  unpack_python
  install_wheels "torch==$torch" "numpy<2.3" safetensors filelock typing_extensions sympy mpmath networkx jinja2 markupsafe fsspec \
    pytest pluggy iniconfig packaging pygments hypothesis sortedcontainers attrs pybind11 setuptools tensorly scipy
  write_python
fi
build_extension
"$folder/python" -c "import platform, torch; print(platform.machine(), 'torch', torch.__version__)"
